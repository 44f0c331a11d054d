"""Run folders: what a run writes, and how it is found, read and drawn."""
