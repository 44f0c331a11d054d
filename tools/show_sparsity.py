"""The same as ``ssr-rec show-sparsity``, whose code is ``ssr_rec/commands/show_sparsity.py``."""

import sys

from ssr_rec.commands.show_sparsity import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
