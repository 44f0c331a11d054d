"""Reads text files from outside within bounds, and takes nothing in them but plain values.

JSON and YAML allow more than a config or a schema ever holds: a key given twice, numbers and nesting without end,
half a character. Each is refused here, with its place, because the code behind would take it silently or break on it.
"""

from __future__ import annotations

import json
import math
import os
from datetime import date
from pathlib import Path
from typing import Any

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local

MAX_DEPTH = 32
"""Sections within sections; ours are at most five deep, and recursion over a value must end."""


def read_text(path: str | Path, most_bytes: int, fix: str) -> str:
    """Return the UTF-8 text of a regular file.

    Args:
        most_bytes: a larger file is refused before it is read.
        fix: what to do instead, for the message.

    Raises:
        UserError: unreadable, no regular file (reading a pipe would wait for ever), too large, or not UTF-8.
    """
    path = Path(path) if isinstance(path, str) else path
    # Not Path's own questions, which raise for a name that no file can have.
    if is_local(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file; {fix}")
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}; {fix}") from None
    if len(data) > most_bytes:
        raise UserError(f"{path}: larger than {most_bytes:,} bytes; {fix}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}; {fix}") from None


def canonical_json(values: Any) -> bytes:
    """Return the JSON of which digests are taken: the same for equal values, whatever the order of their keys."""
    return json.dumps(values, sort_keys=True).encode()


def parse_json(text: str, nan: bool = False) -> Any:
    """Return the value of a JSON text, checked by ``check_plain``; ``nan`` allows NaN and the infinities.

    Raises:
        UserError: not JSON, a key given twice, or not plain.
    """
    try:
        value = json.loads(text, object_pairs_hook=_mapping, parse_int=_integer)
    except RecursionError:
        raise UserError(f"nested more than {MAX_DEPTH} deep") from None
    check_plain(value, nan)
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise UserError(f"key {key[:80]!r} is given twice")
        mapping[key] = value
    return mapping


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise UserError(f"{digits[:20]}... is beyond 64 bits")
    return int(digits)


def check_plain(value: Any, nan: bool = False) -> None:
    """Refuse what is not nested mappings and lists of text, finite numbers, dates, booleans and nulls.

    Raises:
        UserError: where and what: a key that is not text, an integer beyond 64 bits, a number that is not finite,
            a character that is not one (NUL, half of a surrogate pair), nesting beyond ``MAX_DEPTH``.
    """
    left: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while left:
        keys, inner = left.pop()
        problem = _problem(inner, nan) if len(keys) <= MAX_DEPTH else f"nested more than {MAX_DEPTH} deep"
        if problem:
            raise UserError(f"{'.'.join(map(str, keys))[:80] or 'top level'}: {problem}")
        if isinstance(inner, dict):
            left += [((*keys, key), item) for key, item in inner.items()]
        elif isinstance(inner, list):
            left += [((*keys, index), item) for index, item in enumerate(inner)]


def _problem(value: Any, nan: bool = False) -> str | None:
    """Return what is wrong with a value itself, its items apart."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"key {str(key)[:80]!r} is not text; quote it"
            if problem := _problem(key):
                return f"in a key, {problem}"
        return None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "an integer beyond 64 bits"
    if isinstance(value, float):
        return None if nan or math.isfinite(value) else f"{value} is not a finite number"
    if isinstance(value, str):
        wrong = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        return f"the character {wrong!r} is not text" if wrong else None
    if value is None or isinstance(value, (list, date)):
        return None
    return f"{type(value).__name__} is not a plain value"
