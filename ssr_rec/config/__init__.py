"""Defines the config of a run, one file a section; importing it imports neither torch nor torchrec."""
