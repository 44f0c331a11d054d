"""The synthetic click log that the repository draws for itself."""
