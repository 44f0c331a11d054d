"""Defines the error for what a user can cause and mend."""


class UserError(ValueError):
    """Is raised for bad input: a config key, a file, a column, a value, a number of ranks.

    Its text names the value, the file or feature, and the fix; commands print it as one line and end with exit code 2.
    Any other exception is a fault of ours or of a library, and keeps its traceback.
    """
