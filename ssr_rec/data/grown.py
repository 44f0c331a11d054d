"""What holds a dataset together that grows: the types its columns had, and ids that a day cannot know yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ibis.expr import datatypes as dt

from ssr_rec.data.sources import Log
from ssr_rec.data.table_spec import TableSpec
from ssr_rec.schema import Schema, Vocabulary


def staged_as(log: Log, spec: TableSpec, whole: dict[str, bool]) -> dict[str, Any]:
    """How the columns whose text or order counts were read, as JSON values: ``kinds`` and ``whole``.

    The same value must have the same text in every later row: 007 as text is another value than 7.
    """
    columns = [*spec.categorical, *spec.lists, *(name for name in (spec.group_id, spec.time_column) if name)]
    types = log.rows(list(dict.fromkeys(columns))).schema()
    return {"kinds": {name: kind_of(types[name]) for name in dict.fromkeys(columns)}, "whole": whole}


def kind_of(kind: dt.DataType) -> str:
    """A type up to what changes no text: all integers are ``integer``, of lists ``integer items``."""
    if isinstance(kind, dt.Array):
        return f"{kind_of(kind.value_type)} items"
    if kind.is_integer():
        return "integer"
    return "timestamp" if kind.is_timestamp() else str(kind).removeprefix("!")


def without_later_ids(batch: pa.RecordBatch, schema: Schema, sizes: Mapping[str, int]) -> pa.RecordBatch:
    """A batch of ids in which those from ``sizes`` on are out of vocabulary."""
    for feature in schema.features:
        if feature.name not in sizes:
            continue
        assert isinstance(feature.encoding, Vocabulary)
        place, oov = batch.schema.get_field_index(feature.name), feature.encoding.oov_id
        column = batch.column(place)
        ids = column.values if feature.kind == "list" else column
        ids = pc.if_else(pc.less(ids, sizes[feature.name]), ids, pa.scalar(oov, ids.type))
        if feature.kind == "list":
            ids = pa.ListArray.from_arrays(column.offsets, ids)
        batch = batch.set_column(place, batch.schema.field(place), ids)
    return batch
