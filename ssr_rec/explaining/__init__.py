"""Asks a trained model what it relies on, where it is worst, how calibrated it is and how its inputs have changed."""
