"""Writes files and folders whole or not at all: beside their place, and then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, whose file becomes ``path`` when the block ends well, and vanishes when it does not."""
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def partial_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that ``new_file`` is writing, or was when its process was killed."""
    return sorted(folder.glob(".*.partial"))


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: a crash, also of the machine, leaves the old one."""
    with new_file(Path(path)) as work, open(work, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_folder(work: Path, folder: Path, older: Path) -> None:
    """Rename ``work`` to ``folder``; what was there stands as ``older`` meanwhile and is removed after.

    Interrupted between the two renames, it puts the older folder back.
    """
    try:
        if folder.exists():
            shutil.rmtree(older, ignore_errors=True)  # of a process that was killed here
            os.rename(folder, older)
        os.rename(work, folder)
    finally:
        if older.exists() and not folder.exists():
            os.rename(older, folder)
        shutil.rmtree(older, ignore_errors=True)
