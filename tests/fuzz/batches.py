"""What a dataset gives its reader, in a form that compares: the oracle of the schema and the shard targets."""

from __future__ import annotations

from pathlib import Path

from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema

Columns = dict[str, list]
"""Feature, label or ``group`` -> values row by row, a list per row for features."""


def read_columns(folder: Path, schema: Schema, split: str) -> Columns:
    """Every row of a split in stored order."""
    columns: Columns = {name: [] for name in (*schema.feature_names, *schema.labels, "group")}
    for batch in Reader(folder, schema, split, batch_size=16, num_lanes=1, seed=None).reading(prefetch=1).epoch(0):
        for name in schema.feature_names:
            jagged = batch.sparse[name]
            ids, at = jagged.values().tolist(), 0
            for length in jagged.lengths().tolist():
                columns[name].append(ids[at : at + length])
                at += length
        for task, name in enumerate(schema.labels):
            columns[name] += batch.labels[:, task].tolist()
        columns["group"] += [] if batch.group_ids is None else batch.group_ids.tolist()
    return columns


def read_splits(folder: Path, schema: Schema) -> dict[str, Columns]:
    return {split: read_columns(folder, schema, split) for split in schema.splits}
