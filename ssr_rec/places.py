"""Where files are: paths on this machine, and URLs of object stores and HDFS, which behave as paths do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast


def place(name: str | Path) -> Path:
    """``name`` as a path, or where it is a URL (``s3://bucket/folder``) as an object of universal_pathlib like one.

    Raises:
        ValueError: a URL of an unknown kind, of one whose package is not installed, or that cannot be reached.
    """
    if not isinstance(name, str) or "://" not in name:
        return Path(name) if isinstance(name, str) else name
    try:
        from upath import UPath

        path = UPath(name)
        # Asks for the package behind, and for the store behind that.
        path.exists()
    except ImportError as error:
        raise ValueError(f"{name}: {error}; with pip, in the environment of every process that reads it") from None
    except Exception as error:  # every store has its own kinds
        shown = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{name}: cannot be reached: {shown}") from None
    return cast(Path, path)


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def source(path: Path) -> Path | IO[bytes]:
    """What pyarrow reads a file from."""
    return path if is_local(path) else path.open("rb")


@contextmanager
def sink(path: Path) -> Iterator[Path | IO[bytes]]:
    """What pyarrow writes a file to."""
    if is_local(path):
        yield path
    else:
        with path.open("wb") as file:
            yield file
