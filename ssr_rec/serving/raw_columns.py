"""Takes raw rows apart into columns, whatever holds them: mappings, pandas, Arrow, parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.spec import nearest
from ssr_rec.serving.id_columns import Column

Rows: TypeAlias = pd.DataFrame | pa.Table | pa.RecordBatch | str | Path | Iterable[Mapping[str, Any]]


def columns_of(rows: Rows, names: Sequence[str]) -> tuple[list[Column], int]:
    """Return the columns of ``names``, and how many rows there are.

    A mapping may lack a key, which is missing there; a table must have every column. What else is there is ignored.

    Raises:
        UserError: see ``Encoder.encode``.
    """
    if isinstance(rows, (str, Path)):
        rows = read_parquet(Path(rows), names)
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if isinstance(rows, pa.Table):
        check_columns(rows.column_names, names)
        columns = _whole_columns(rows.select(list(dict.fromkeys(names))))
        return [columns[name] for name in names], rows.num_rows
    if isinstance(rows, pd.DataFrame):
        check_columns([str(name) for name in rows.columns], names)
        by_name = {str(name): series for name, series in rows.items()}
        return [_of_series(by_name[name]) for name in names], len(rows)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise UserError(
            f"rows are a {type(rows).__name__}; give a list of mappings, a DataFrame, an Arrow table or a path"
        )
    listed = list(rows)
    for number, row in enumerate(listed):
        if not isinstance(row, Mapping):
            raise UserError(f"row {number} is a {type(row).__name__}, not a mapping of feature names to values")
    return [[row.get(name) for row in listed] for name in names], len(listed)


def read_parquet(path: Path, names: Sequence[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        check_columns(file.schema_arrow.names, names)
        return file.read(columns=list(dict.fromkeys(names)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None


def check_columns(columns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a table that lacks a feature's column or has it twice.

    Raises:
        UserError: naming the columns, and the nearest spelling of the first.
    """
    there = set(columns)
    if len(there) == len(columns) and there.issuperset(names):
        return
    lacking = [name for name in names if name not in there]
    if lacking:
        raise UserError(
            f"no column {', '.join(map(repr, lacking[:10]))}{nearest(lacking[0], columns)}; a table needs a column for "
            "every feature, with nulls where it is missing"
        )
    for name in names:
        if columns.count(name) > 1:
            raise UserError(f"column {name!r} is there {columns.count(name)} times; give it once")


def _whole_columns(rows: pa.Table) -> dict[str, pa.Array]:
    if not rows.num_rows:
        return {name: pa.array([], kind) for name, kind in zip(rows.schema.names, rows.schema.types, strict=True)}
    # All columns at once: one by one costs a request more than its ids do.
    batches = rows.combine_chunks().to_batches()
    if len(batches) > 1:
        raise UserError(f"{rows.num_rows} rows with 2 GB of text or more in a column; give fewer rows at once")
    return dict(zip(rows.schema.names, batches[0].columns, strict=True))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        return whole.chunk(0) if whole.num_chunks else pa.array([], type=column.type)
    return whole


def _of_series(series: pd.Series) -> Column:
    if series.dtype == object:  # Arrow would take a type that a part of the values is not of
        return series.tolist()
    try:
        array = pa.Array.from_pandas(series)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):  # values of several types: each by itself
        return series.tolist()
    return _whole(array) if isinstance(array, pa.ChunkedArray) else array
