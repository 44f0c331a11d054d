"""Keeps memory that was freed for the next step, where the C library would give it back to the system."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, from glibc's malloc.h."""
NEVER = 2**31 - 1
LARGEST_KEPT = 2**28
"""Bytes: arrays above this, such as tables, still get pages of their own and give them back."""


def keep_freed_memory() -> None:
    """Let malloc of this process reuse freed memory; does nothing where the C library is not glibc.

    A training step frees its activations and asks for as many again. By default glibc returns blocks of megabytes to
    the system, which hands them back page by page, each with a fault and zeros: a fifth of a step and more
    (docs/performance.md). The most memory that a process holds stays about the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
