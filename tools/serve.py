"""The same as ``ssr-rec serve``, whose code is ``ssr_rec/commands/serve.py``."""

import sys

from ssr_rec.commands.serve import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
