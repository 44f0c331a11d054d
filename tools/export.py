"""The same as ``ssr-rec export``, whose code is ``ssr_rec/commands/export.py``."""

import sys

from ssr_rec.commands.export import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
