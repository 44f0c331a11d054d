"""Draws the repository's own synthetic click log."""
