"""The same as ``ssr-rec explain``, whose code is ``ssr_rec/commands/explain.py``."""

import sys

from ssr_rec.commands.explain import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
