"""The same as ``ssr-rec show``, whose code is ``ssr_rec/commands/show.py``."""

import sys

from ssr_rec.commands.show import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
