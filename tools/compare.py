"""The same as ``ssr-rec compare``, whose code is ``ssr_rec/commands/compare.py``."""

import sys

from ssr_rec.commands.compare import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
