"""The id of one raw value at a time, in plain Python: what ``ssr_rec/serving/id_columns.py`` must equal."""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import LISTED, AdmittedHashing, Drawn, Feature, Hashing, LogBuckets, RawHash, Vocabulary
from ssr_rec.data.preparation.encode import RAW_DIGITS, log_transform
from ssr_rec.serving.raw_values import number_of, shown, text_of

WHOLE_FLOAT = re.compile(r"-?[0-9]+\.0+")
ToId = Callable[[Any], int]


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
        table = pq.read_table(folder / encoding.file, columns=["value", "id"])
        ids = dict(zip(table["value"].to_pylist(), table["id"].to_pylist(), strict=True))
        return _listed_id(encoding, ids)
    return _drawn_id(encoding, feature.num_embeddings)


def _listed_id(encoding: Vocabulary | AdmittedHashing, ids: dict[str, int]) -> ToId:
    missing, oov, find = encoding.missing_id, encoding.oov_id, ids.get

    def to_id(value: Any) -> int:
        text = text_of(value)
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
