"""Reads any column of a split and names its values: a raw value where a vocabulary knows it, else what the id means."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import source
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from ssr_rec.data.value_columns import value_names


class Column(NamedTuple):
    """Holds a column as ``codes (N,)`` into ``names``, the distinct values in the order of their ids."""

    name: str
    codes: np.ndarray
    names: list[str]


def read_column(folder: Path, schema: Schema, split: str, name: str, rows: int) -> Column:
    """Return a column of the first ``rows`` rows of a split; of a list feature, how many items each row has.

    Args:
        folder: the prepared dataset.
        schema: of the whole dataset, also of features that a run left out.
        split: its name.
        name: a feature, a label, the group id, or any other single-valued column that the shards hold.
        rows: how many.

    Raises:
        UserError: the shards hold no such column, or it is no single value a row.
    """
    stored = GROUP_COLUMN if name == schema.group_id and name not in schema.feature_names else name
    parts, left = [], rows
    for shard in schema.splits[split].shards:
        if left <= 0:
            break
        file = pq.ParquetFile(source(folder / shard.path))
        if stored not in file.schema_arrow.names:
            raise UserError(
                f"column {name!r}: the shards of {folder} do not hold it; they have "
                f"{', '.join(file.schema_arrow.names)}. Prepare the log with it among the features; a run can leave it "
                "out by data.features"
            )
        parts.append(file.read(columns=[stored]).column(0).slice(0, left))
        left -= len(parts[-1])
    feature = next((f for f in schema.features if f.name == name), None)
    if feature is not None and feature.kind == "list":
        values = np.concatenate([part.combine_chunks().value_lengths().to_numpy() for part in parts])
        ids, codes = np.unique(values, return_inverse=True)
        return Column(name, codes, [f"{count} items" for count in ids.tolist()])
    values = np.concatenate([part.to_numpy() for part in parts])
    if values.dtype == object:
        raise UserError(f"column {name!r}: not one number a row; slice by a single-valued column")
    ids, codes = np.unique(values, return_inverse=True)
    names = value_names(feature, folder, ids) if feature is not None else [f"{value:g}" for value in ids.tolist()]
    return Column(name, codes, names)
