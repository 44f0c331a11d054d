"""Runs the training loop: pipeline, cadence, evaluation, early stopping."""
