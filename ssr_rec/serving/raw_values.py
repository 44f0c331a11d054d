"""Turns a raw value or a column of them into ids: in Python and Arrow what ``preparation/encode.py`` tells the engine.

A value counts by its text, as in the preparation: 7 is ``7``, True is ``true``, a date is ISO. pandas makes integers
with gaps floats, so a whole float is that integer. None, NaN, NA and NaT are missing.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import source
from ssr_rec.data.features import LISTED, AdmittedHashing, Drawn, Feature, Hashing, LogBuckets, RawHash, Vocabulary
from ssr_rec.data.preparation.encode import RAW_DIGITS, log_transform

MAX_EXACT = 2**53
"""Beyond it a float does not say which integer it was."""
MAX_INTEGER = 2**127
WHOLE_FLOAT = re.compile(r"-?[0-9]+\.0+")

ToId = Callable[[Any], int]
"""The id of one value.

Raises:
    UserError: a value of the wrong type; what it holds, to follow ``row 3: feature 'x' ``.
"""


def make_to_id(feature: Feature, folder: Path, is_canonical: bool = True) -> ToId:
    """Return the encoding of a feature, or of the items of a list feature.

    Args:
        folder: of the artifact, or of the prepared dataset, for its vocabulary.
        is_canonical: the preparation gave text its one form, which older datasets do not have.
    """
    to_id = _to_id_of_text(feature, folder)
    if not is_canonical or isinstance(feature.encoding, (LogBuckets, Drawn)):
        return to_id
    return lambda value: to_id(canonical_text(value) if isinstance(value, str) else value)


def canonical_text(text: str) -> str | None:
    """Return the one form of a text: what ``preparation/sources.py`` makes of it; None for missing."""
    if text in ("True", "TRUE"):
        return "true"
    if text in ("False", "FALSE"):
        return "false"
    if text.endswith("0") and WHOLE_FLOAT.fullmatch(text):
        return text.split(".")[0]
    return text or None


def _to_id_of_text(feature: Feature, folder: Path) -> ToId:
    encoding = feature.encoding
    if isinstance(encoding, LogBuckets):
        return _bucket_id(encoding)
    if isinstance(encoding, Hashing):
        return _hash_id(encoding)
    if isinstance(encoding, RawHash):
        return _raw_hash_id
    if isinstance(encoding, LISTED):
        table = pq.read_table(source(folder / encoding.file), columns=["value", "id"])
        ids = dict(zip(table["value"].to_pylist(), table["id"].to_pylist(), strict=True))
        return _listed_id(encoding, ids)
    return _drawn_id(encoding, feature.num_embeddings)


def _listed_id(encoding: Vocabulary | AdmittedHashing, ids: dict[str, int]) -> ToId:
    missing, oov, find = encoding.missing_id, encoding.oov_id, ids.get

    def to_id(value: Any) -> int:
        kind = type(value)
        if kind is str:
            return find(value, oov)
        text = str(value) if kind is int and -MAX_INTEGER <= value < MAX_INTEGER else text_of(value)
        return missing if text is None else find(text, oov)

    return to_id


def _hash_id(encoding: Hashing) -> ToId:
    def to_id(value: Any) -> int:
        digest = _md5(value)
        return encoding.missing_id if digest is None else encoding.first_id + int(digest, 16) % encoding.num_buckets

    return to_id


def _raw_hash_id(value: Any) -> int:
    digest = _md5(value)
    return 0 if digest is None else 1 + int(digest[:RAW_DIGITS], 16)


def _md5(value: Any) -> str | None:
    """Return hexadecimal digits of the md5 of a value's text; None for missing."""
    text = text_of(value)
    if text is None:
        return None
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half of a surrogate pair, which is no text") from None
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _bucket_id(encoding: LogBuckets) -> ToId:
    is_one = encoding.high <= encoding.low
    width = 1.0 if is_one else (encoding.high - encoding.low) / encoding.num_buckets

    def to_id(value: Any) -> int:
        number = number_of(value)
        if number is None:
            return encoding.missing_id
        position = 0 if is_one else math.floor((log_transform(number) - encoding.low) / width)
        return encoding.first_id + min(max(position, 0), encoding.num_buckets - 1)

    return to_id


def _drawn_id(encoding: Drawn, size: int) -> ToId:
    def to_id(value: Any) -> int:
        text = text_of(value)
        if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) >= size:
            raise UserError(f"holds {shown(value)}; it was drawn as ids, which are whole numbers from 0 to {size - 1}")
        return int(text)

    return to_id


def text_of(value: Any) -> str | None:
    """Return the text that a vocabulary or hash knows a value by; None for missing.

    Raises:
        UserError: a value with no one text form.
    """
    kind = type(value)
    if kind is str:
        return value
    if kind is bool or isinstance(value, np.bool_):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        whole = int(value)
        if not -MAX_INTEGER <= whole < MAX_INTEGER:
            raise UserError("holds an integer beyond 128 bits")
        return str(whole)
    if is_missing(value):
        return None
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not (abs(number) <= MAX_EXACT and number.is_integer()):
            raise UserError(f"holds {shown(value)}; a category is text, a whole number, a boolean or a date")
        return str(int(number))
    if isinstance(value, str):
        return str(value)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    raise UserError(f"holds {shown(value)}; a category is text, a whole number, a boolean or a date")


def number_of(value: Any) -> float | None:
    """Return a number as float64; None for missing.

    Raises:
        UserError: no number, or one that is not finite.
    """
    if is_missing(value):
        return None
    if not isinstance(value, (int, float, np.number, np.bool_)) or isinstance(value, np.complexfloating):
        raise UserError(f"holds {shown(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"holds {shown(value)}; a number must be finite, and missing is None or NaN")
    return number


def is_missing(value: Any) -> bool:
    return (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, (float, np.floating)) and value != value)
    )


def items_of(value: Any, separator: str | None) -> Sequence[Any]:
    """Return the items of a list feature's value; missing is empty.

    Raises:
        UserError: not a list, nor text that the preparation would cut into one.
    """
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if is_missing(value):
        return ()
    if isinstance(value, str) and separator is not None:
        return value.split(separator) if value else ()
    wanted = f"a list, or text with {separator!r} between the items" if separator else "a list"
    raise UserError(f"holds {shown(value)}, not {wanted}")


def shown(value: Any) -> str:
    """Return a value for a message, shortened; its type where it is none that people write."""
    if isinstance(value, (str, bytes)):
        return f"the {type(value).__name__} {value[:40]!r}{'...' if len(value) > 40 else ''}"
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        return "an integer beyond 128 bits"
    if isinstance(value, (int, float, np.number, np.bool_)):
        return f"the {type(value).__name__} {value}"
    return f"a {type(value).__name__}"


def id_column(values: Sequence[Any] | pa.Array, to_id: ToId) -> np.ndarray:
    """Return the ids (n,) int64 of a column.

    Raises:
        UserError: a value of the wrong type, with ``row`` its place.
    """
    if not isinstance(values, pa.Array):
        return _each(values, to_id)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not _has_few_forms(values.type):
        return _each(values.to_pylist(), to_id)
    # Each distinct value once: in a log there are few, and Python reads them one by one.
    encoded = values.dictionary_encode(null_encoding="encode")
    places = encoded.indices.to_numpy(zero_copy_only=False)
    try:
        return _each(encoded.dictionary.to_pylist(), to_id)[places]
    except WrongValue as error:
        raise WrongValue(int(np.argmax(places == error.row)), error.problem) from None


def _has_few_forms(kind: pa.DataType) -> bool:
    """Return whether Arrow finds the distinct values of a column; of string_view (26.0) it finds wrong ones."""
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_float32(kind)
        or types.is_float64(kind)
    )


class WrongValue(UserError):
    """Is raised for a value of the wrong type, with its place in the column."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row} {problem}")
        self.row, self.problem = row, problem


def _each(values: Sequence[Any], to_id: ToId) -> np.ndarray:
    try:
        return np.array([to_id(value) for value in values], dtype=np.int64)
    except ValueError:
        for row, value in enumerate(values):
            try:
                to_id(value)
            except ValueError as error:
                raise WrongValue(row, str(error)) from None
        raise
