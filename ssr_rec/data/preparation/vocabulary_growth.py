"""Reads known vocabularies as lookups again, and appends further values to them; ids that are given never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis.expr.types import Column, Table

from ssr_rec.data.features import AdmittedHashing, Vocabulary
from ssr_rec.data.preparation.fit import VOCABULARY_FOLDER
from ssr_rec.data.preparation.split import SPLIT


@dataclass(frozen=True)
class Growth:
    """Holds what days added to a vocabulary."""

    values: pa.Table
    """(value as in the column, id, count on the day that gave the id)."""
    sizes: list[int]
    """Rows of the table before each of the days, and after the last."""


def known_values(folder: Path, encoding: Vocabulary | AdmittedHashing, column: Column) -> pa.Table:
    """Return (value as in ``column``, id) of a values file."""
    table = pq.read_table(folder / encoding.file, columns=["value", "id"])
    kind = column.type().value_type if column.type().is_array() else column.type()
    # Later files may hold the same numbers in a narrower type.
    kind = pa.int64() if kind.is_signed_integer() else kind.to_pyarrow()
    return pa.table({"value": table["value"].cast(kind), "id": table["id"].cast(pa.int32())})


def growth(rows: Table, columns: Sequence[str], known: Table, size: int, min_count: int, days: int) -> Growth:
    """Return the values without id that occur ``min_count`` times on one of ``days`` days, with ids from ``size`` on.

    Days come one after the other, as if each had been added by itself; within a day ids are given by descending
    count, ties by the bytes of the value's text.

    Args:
        rows: with ``SPLIT``, the number of the day.
        columns: that share the vocabulary, counted together.
        known: (value, id) of the vocabulary so far.
    """
    each = [rows.select(value=rows[column], day=rows[SPLIT]) for column in columns]
    each = [values.unnest("value") if values["value"].type().is_array() else values for values in each]
    values = ibis.union(*each) if len(each) > 1 else each[0]
    values = values.filter(values["value"].notnull())
    counted = values.group_by("value", "day").agg(count=lambda t: t.count())
    counted = counted.filter(counted["count"] >= min_count)
    found = counted.anti_join(known, counted["value"] == known["value"]).to_pyarrow()
    texts = found["value"].cast(pa.string())
    keys = pa.table({"day": found["day"], "count": found["count"], "text": texts})
    order = pc.sort_indices(
        keys, sort_keys=[("day", "ascending"), ("count", "descending"), ("text", "ascending")]
    ).to_numpy()
    # The first day on which a value occurs often enough gives it its id.
    codes = pc.dictionary_encode(texts).combine_chunks().indices.to_numpy()[order]
    kept = order[np.sort(np.unique(codes, return_index=True)[1])]
    found = found.take(pa.array(kept))
    before = np.searchsorted(found["day"].to_numpy(), np.arange(days + 1))
    ids = pa.array(np.arange(size, size + len(found), dtype=np.int32))
    return Growth(
        pa.table({"value": found["value"], "id": ids, "count": found["count"].cast(pa.int64())}),
        [size + int(count) for count in before],
    )


def write_grown(encoding: Vocabulary, values: pa.Table, folder: Path, work: Path, place: str) -> Vocabulary:
    """Write the vocabulary of ``folder`` with ``values`` appended, as a file of its own under ``work``.

    Args:
        place: folder for it within the dataset's vocabularies: who has read the old schema reads the old file.
    """
    # Named as before, so that columns that share a vocabulary go on to share a file.
    written = encoding.model_copy(update={"file": f"{VOCABULARY_FOLDER}/{place}/{Path(encoding.file).name}"})
    if (work / written.file).exists():
        return written
    old = pq.read_table(folder / encoding.file)
    columns = [values["value"].cast(pa.string()), values["id"].cast(pa.int64()), values["count"]]
    (work / written.file).parent.mkdir(parents=True, exist_ok=True)
    new = pa.table(columns, schema=old.schema)
    pq.write_table(pa.concat_tables([old, new]), work / written.file, compression="zstd")
    return written
