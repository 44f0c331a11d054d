"""The training loop: pipeline, cadence, evaluation, early stopping."""
