"""Makes raw rows that encode to given ids, for timing what raw rows cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from inference_cases import Rows

from ssr_rec.common.paths import source
from ssr_rec.data.features import LISTED, Drawn, Feature, LogBuckets
from ssr_rec.data.schema import Schema

UNKNOWN = "a value that no vocabulary has"


def raw_rows(schema: Schema, folder: Path, rows: Rows, start: int, stop: int) -> list[dict[str, Any]]:
    """Return rows start .. stop as mappings, as an application would send them.

    A hashed id comes from a text of its own, not from one that hashes to it: the time is the same.

    Args:
        folder: the artifact, for its vocabularies.
    """
    table: list[dict[str, Any]] = [{} for _ in range(start, stop)]
    for feature, ids, offsets in zip(schema.features, rows.ids, rows.offsets, strict=True):
        values = _values(feature, folder)
        for row, at in zip(table, range(start, stop), strict=True):
            found = [values(int(i)) for i in ids[offsets[at] : offsets[at + 1]]]
            row[feature.encoding.column] = found if feature.kind == "list" else found[0]
    return table


def _values(feature: Feature, folder: Path) -> Any:
    """Return a function from an id to a raw value; missing ids are None."""
    encoding = feature.encoding
    if isinstance(encoding, Drawn):
        return int
    if isinstance(encoding, LogBuckets):
        return lambda i: None if i == encoding.missing_id else encoding.middle(i)
    if isinstance(encoding, LISTED):
        stored = pq.read_table(source(folder / encoding.file))
        texts = dict(zip(stored["id"].to_pylist(), stored["value"].to_pylist(), strict=True))
        return lambda i: None if i == encoding.missing_id else texts.get(i, UNKNOWN)
    return lambda i: None if i == encoding.missing_id else str(i)
