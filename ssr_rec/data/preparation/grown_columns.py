"""Holds a growing dataset together: by the types its columns had, and without ids that a day cannot know yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from ibis.expr import datatypes as dt
from ibis.expr.types import Column, Table

from ssr_rec.data.features import Vocabulary
from ssr_rec.data.preparation.engine import Engine
from ssr_rec.data.preparation.sources import Log
from ssr_rec.data.preparation.spec import TableSpec
from ssr_rec.data.preparation.split import SPLIT, Numbers
from ssr_rec.data.schema import Schema


def staged_as(log: Log, spec: TableSpec, whole: dict[str, Numbers]) -> dict[str, Any]:
    """Return how the columns whose text or order counts were read, as JSON values: ``kinds`` and ``whole``.

    The same value must have the same text in every later row: 007 as text is another value than 7.
    """
    columns = [
        *spec.categorical,
        *spec.list_columns,
        *(name for name in (spec.group_id, spec.together, spec.time_column) if name),
    ]
    types = log.rows(list(dict.fromkeys(columns))).schema()
    return {"kinds": {name: kind_of(types[name]) for name in dict.fromkeys(columns)}, "whole": whole}


def kind_of(kind: dt.DataType) -> str:
    """Return a type up to what changes no text: all integers are ``integer``, of lists ``integer items``."""
    if isinstance(kind, dt.Array):
        return f"{kind_of(kind.value_type)} items"
    if kind.is_integer():
        return "integer"
    return "timestamp" if kind.is_timestamp() else str(kind).removeprefix("!")


def without_later_ids(encoded: Table, engine: Engine, schema: Schema, after: Mapping[str, Sequence[int]]) -> Table:
    """Return encoded rows in which ids that only a later split gave are out of vocabulary.

    Args:
        after: feature -> rows of its table after each split.
    """
    if not after:
        return encoded
    places = {name: f"__size{place}__" for place, name in enumerate(after)}
    splits = pa.array(range(len(next(iter(after.values())))), pa.int64())
    sizes = pa.table({"__day__": splits, **{places[name]: pa.array(found) for name, found in after.items()}})
    table = engine.store("sizes", sizes)
    joined = encoded.join(table, encoded[SPLIT] == table["__day__"])
    columns: dict[str, Column] = {}
    for feature in schema.features:
        if feature.name in after:
            assert isinstance(feature.encoding, Vocabulary)
            ids, size, oov = joined[feature.name], joined[places[feature.name]], feature.encoding.oov_id
            columns[feature.name] = (
                ids.map(lambda item, size=size, oov=oov: (item < size).ifelse(item, oov))
                if feature.kind == "list"
                else (ids < size).ifelse(ids, oov)
            )
    return joined.select(**{name: columns.get(name, joined[name]) for name in encoded.columns})
