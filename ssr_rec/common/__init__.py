"""Common parts know nothing of recommenders: strict settings, plain values, paths, versions, formatting."""
