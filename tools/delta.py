"""The same as ``ssr-rec delta``, whose code is ``ssr_rec/commands/delta.py``."""

import sys

from ssr_rec.commands.delta import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
