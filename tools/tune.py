"""The same as ``ssr-rec tune``, whose code is ``ssr_rec/commands/tune.py``."""

import sys

from ssr_rec.commands.tune import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
