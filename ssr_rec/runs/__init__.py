"""Writes what a run leaves in its folder, and finds, reads and draws it."""
