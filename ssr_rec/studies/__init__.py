"""Studies compare runs: figures and tables of many configs and seeds."""
