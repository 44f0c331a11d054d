"""Keeps memory that was freed for the next step, where the C library would give it back to the system."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, from glibc's malloc.h."""
NEVER = -1
LARGEST_KEPT = (2**28, 2**25)
"""Bytes, the first that the C library takes (before glibc 2.35 the second): larger arrays, such as most tables, still
get pages of their own and give them back."""


def keep_freed_memory() -> None:
    """Let malloc of this process reuse freed memory; does nothing where the C library is not glibc.

    A training step frees its activations and asks for as many again. By default glibc returns blocks of megabytes to
    the system, which hands them back page by page, each with a fault and zeros: a fifth of a step and more
    (docs/performance.md). The most memory that a process holds stays about the same; between steps it holds more.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # Whichever is set first ends glibc's own tuning of both: without the other, every block would cost its faults.
    if any(libc.mallopt(MMAP_THRESHOLD, size) for size in LARGEST_KEPT):
        libc.mallopt(TRIM_THRESHOLD, NEVER)
