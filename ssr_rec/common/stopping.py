"""Remembers a request to stop, Ctrl-C or a polite kill, so that no library on the way can swallow it.

A ``KeyboardInterrupt`` within a call of DuckDB comes out as an error of the query; one within a destructor does not
come out at all.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from ssr_rec.common.errors import UserError

EXIT_CODE = 130
"""After a request to stop, as shells have it."""

_asked: list[int] = []  # not an Event: a signal may interrupt the handler of the one before it, within its lock


def listen() -> None:
    """Raise ``KeyboardInterrupt`` in the main thread at SIGINT and SIGTERM, and remember it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def is_asked() -> bool:
    """Return whether a stop was asked for since ``listen``."""
    return bool(_asked)


def check() -> None:
    """Stop work that goes on although a stop was asked for.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _asked:
        raise KeyboardInterrupt


def exit_status(error: BaseException, stopped: str) -> int:
    """Say in a line why a tool ends and return its exit status: ``EXIT_CODE`` with ``stopped``, or 2 for bad input.

    Raises:
        BaseException: ``error`` itself, where it is a fault of ours.
    """
    if is_asked() or isinstance(error, KeyboardInterrupt):
        print(f"stopped{stopped}", file=sys.stderr)
        return EXIT_CODE
    if not isinstance(error, (UserError, OSError)):
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _stop(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    raise KeyboardInterrupt
