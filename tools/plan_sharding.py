"""The same as ``ssr-rec plan``, whose code is ``ssr_rec/commands/plan.py``."""

import sys

from ssr_rec.commands.plan import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
