"""Computes AUC, GAUC, logloss, NE and calibration, exact or bounded."""
