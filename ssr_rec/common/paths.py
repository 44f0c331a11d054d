"""Turns names of files into paths: on this machine, or URLs of object stores and HDFS, which behave as paths do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from ssr_rec.common.errors import UserError


def place(name: str | Path) -> Path:
    """Return ``name`` as a path, or a URL (``s3://bucket/folder``) as an object of universal_pathlib like one.

    Raises:
        UserError: a URL of an unknown kind, of one whose package is not installed, or that cannot be reached.
    """
    if not isinstance(name, str) or "://" not in name:
        return Path(name) if isinstance(name, str) else name
    refuse_secrets(name)
    try:
        from upath import UPath

        path = UPath(name)
        # Asks for the package behind, and for the store behind that.
        path.exists()
    except ImportError as error:
        raise UserError(f"{name}: {error}; with pip, in the environment of every process that reads it") from None
    except Exception as error:  # every store has its own kinds
        shown = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name}: cannot be reached: {shown}") from None
    return cast(Path, path)


_USER = re.compile(r"://[^/@]*@")
_SECRET = re.compile(r"(?i)[?&][^=&]*(key|token|secret|sig|signature|password|credential)[^=&]*=[^&]*")


def refuse_secrets(url: str) -> None:
    """Refuse a URL with a password, key or signature in it, which configs, reports and logs would hold for ever.

    Raises:
        UserError: names the URL without what is secret, and the fix.
    """
    if "://" in url and (_USER.search(url) or _SECRET.search(url)):
        shown = _SECRET.sub(lambda found: f"{found[0].split('=')[0]}=***", _USER.sub("://***@", url))
        raise UserError(
            f"{shown}: credentials in a URL would be written to files and logs; give them to the store's own package, "
            "such as AWS_ACCESS_KEY_ID in the environment, or a file under ~/.aws"
        )


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def source(path: Path) -> Path | IO[bytes]:
    """Return what pyarrow reads a file from."""
    return path if is_local(path) else path.open("rb")


@contextmanager
def sink(path: Path) -> Iterator[Path | IO[bytes]]:
    """Yield what pyarrow writes a file to."""
    if is_local(path):
        yield path
    else:
        with path.open("wb") as file:
            yield file
