"""Says how a training process ends: an exit code, and one line where somebody can mend it (docs/reliability.md)."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading

from ssr_rec.common.errors import UserError
from ssr_rec.training.stall_watch import PREEMPTED, STOPS, Preempted

TRY_AGAIN, BAD_INPUT = 1, 2
FOR_GOOD = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS}
"""System errors that the same command meets again, unlike a full disk or a lost peer."""


def exit_code_of(error: BaseException) -> int | None:
    """Return the exit code for an error and print its line; None for a fault of ours, whose traceback is wanted."""
    if isinstance(error, (Preempted, KeyboardInterrupt)):
        # A launcher may pass on the same request later than the terminal; this process ends anyway.
        if threading.current_thread() is threading.main_thread():
            for kind in STOPS:
                signal.signal(kind, signal.SIG_IGN)
        if int(os.environ.get("RANK", "0")) == 0:
            what = str(error) or "stopped before the first step or while testing"
            print(f"{what}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED
    if isinstance(error, UserError):
        # Every rank meets the same bad config or dataset: one line per host is enough.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, OSError) or (isinstance(error, RuntimeError) and lost_peer(error)):
        print(f"error: {error}"[:500], file=sys.stderr)
        return BAD_INPUT if isinstance(error, OSError) and error.errno in FOR_GOOD else TRY_AGAIN
    return None


def lost_peer(error: Exception) -> bool:
    """Return whether a collective failed because another rank ended; that rank says why."""
    return any(text in str(error) for text in ("gloo/transport", "ncclRemoteError", "Connection closed by peer"))
