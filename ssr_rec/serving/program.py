"""Loads a compiled program so that no file of it stays behind, however the process ends.

torch unpacks a program to the temporary folder for as long as it is loaded, where it stays when the process is killed.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import shutil
import struct
import tempfile
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ssr_rec.common.errors import UserError

PREFIX = "ssr_rec.program."
SECONDS_TO_LOCK = 60.0
"""Between making a folder and holding its lock another process must not take it for a killed one's."""
HEADER_BYTES, SECTION_BYTES = 64, 64
"""Of ELF of 64 bits: its header, and what describes a section."""
DYNSYM, SYMBOL_BYTES, UNIQUE, WEAK = 11, 24, 10, 2
"""The type of the section of dynamic symbols, the bytes of one, and two of its bindings."""
_I, _Q, _QQ, _HH = (struct.Struct(f"<{kinds}") for kinds in ("I", "Q", "QQ", "HH"))


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
            for library in root.rglob("*.so"):
                make_unloadable(library)
            with ThreadPoolExecutor(1) as pool:
                program = pool.submit(Program, root, runners).result()
        except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: damaged: {str(error).splitlines()[0]}; export the run again") from None
    # The library is mapped into memory, which needs its file no longer.
    return program


class Program:
    """Runs a compiled program, whose library leaves the memory some time after this object.

    Every call into the library, also those that load and free it, leaves something behind for the end of the calling
    thread, and glibc keeps the library until then. So threads that end load and free it; one that has run it must end
    as well. What is ready to be unmapped is so when the next program is freed.
    """

    def __init__(self, root: Path, runners: int) -> None:
        held = [torch._C._aoti.AOTIModelPackageLoader(str(root), "model", False, runners, -1)]
        self._held = held
        # Of _thread: a finaliser may run where another thread's start would wait for a lock of threading.
        weakref.finalize(self, _thread.start_new_thread, held.clear, ()).atexit = False

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._held[0].run(inputs)


def make_unloadable(library: Path) -> None:
    """Rebind the unique symbols of a shared library to weak ones, in place.

    g++ marks what a header defines once (``STB_GNU_UNIQUE``), and glibc never unmaps a library with such a symbol that
    it has bound: each model that a server let go would leave its program in memory. A program needs its own alone.
    """
    data = bytearray(library.read_bytes())
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < HEADER_BYTES:
        return  # not a little-endian ELF of 64 bits, which is what this can read
    at, size, count = _Q.unpack_from(data, 0x28)[0], *_HH.unpack_from(data, 0x3A)
    if size != SECTION_BYTES or at + size * count > len(data):
        return  # without a list of sections, or cut off: whether it can be loaded is the loader's to say
    for section in range(at, at + size * count, size):
        (kind,) = _I.unpack_from(data, section + 4)
        offset, length = _QQ.unpack_from(data, section + 0x18)
        if kind == DYNSYM and offset + length <= len(data):
            for info in range(offset + 4, offset + length, SYMBOL_BYTES):
                if data[info] >> 4 == UNIQUE:
                    data[info] = WEAK << 4 | data[info] & 15
    library.write_bytes(data)


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
