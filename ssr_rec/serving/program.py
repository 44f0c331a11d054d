"""Loads a compiled program so that no file of it stays behind, however the process ends.

torch unpacks a program to the temporary folder for as long as it is loaded, where it stays when the process is killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ssr_rec.common.errors import UserError

PREFIX = "ssr_rec.program."
SECONDS_TO_LOCK = 60.0
"""Between making a folder and holding its lock another process must not take it for a killed one's."""


def load_program(path: Path, runners: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return what runs the program of an artifact's ``model.pt2``: inputs to outputs.

    Args:
        runners: threads that may be in it at the same time; others wait.

    Raises:
        UserError: the file is no program.
    """
    with _folder_of_this_process() as folder:
        try:
            with zipfile.ZipFile(path) as package:
                package.extractall(folder)
            (root,) = folder.iterdir()
            loader = torch._C._aoti.AOTIModelPackageLoader(str(root), "model", False, runners, -1)
        except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: damaged: {str(error).splitlines()[0]}; export the run again") from None
    # The library is mapped into memory, which needs its file no longer.
    return loader.run


@contextmanager
def _folder_of_this_process() -> Iterator[Path]:
    """Yield a temporary folder, locked as long as it is in use; those that killed processes left are removed."""
    _remove_left_ones()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_left_ones() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(lock).st_mtime > SECONDS_TO_LOCK:
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # a living process loads from it
        finally:
            os.close(lock)
