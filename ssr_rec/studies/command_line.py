"""Holds what commands that train several runs share: a whole number as an option, progress lines, a polite stop."""

from __future__ import annotations

import argparse
import signal
import sys


def count(text: str) -> int:
    """Return an option that counts something.

    Raises:
        argparse.ArgumentTypeError: not a whole number of 1 or more.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def say(line: str) -> None:
    """Print a progress line at once, beside the results on standard output."""
    print(line, file=sys.stderr, flush=True)


def stop_politely() -> None:
    """Let SIGTERM stop the trainings as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
