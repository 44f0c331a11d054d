"""Holds what commands that train several runs share: a whole number as an option, a polite stop."""

from __future__ import annotations

import argparse
import signal


def count(text: str) -> int:
    """Return an option that counts something.

    Raises:
        argparse.ArgumentTypeError: not a whole number of 1 or more.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def stop_politely() -> None:
    """Let SIGTERM stop the trainings as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
