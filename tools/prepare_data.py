"""The same as ``ssr-rec prepare``, whose code is ``ssr_rec/commands/prepare.py``."""

import sys

from ssr_rec.commands.prepare import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
