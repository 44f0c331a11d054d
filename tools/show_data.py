"""The same as ``ssr-rec show-data``, whose code is ``ssr_rec/commands/show_data.py``."""

import sys

from ssr_rec.commands.show_data import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
