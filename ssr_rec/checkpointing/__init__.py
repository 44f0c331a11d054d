"""Checkpointing decides when a checkpoint is written, what is in it, and how a run goes on from one."""
