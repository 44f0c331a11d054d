"""The same as ``ssr-rec score``, whose code is ``ssr_rec/commands/score.py``."""

import sys

from ssr_rec.commands.score import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
