"""Turns raw rows (mappings, pandas, Arrow, parquet files) into the arrays that ``Scorer.score_arrays`` takes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.data.dense import DenseColumn, RowVector, WrongVector, scaled, stacked
from ssr_rec.data.features import Feature, LogBuckets
from ssr_rec.data.preparation.spec import ListColumn, nearest
from ssr_rec.data.schema import VALUES, VALUES_KEY, Schema
from ssr_rec.kernels.row_ids import FieldOfRow, RowIds, RowsOfIds
from ssr_rec.serving.id_columns import Column, lists_of, make_to_ids, numbers_of, write_columns
from ssr_rec.serving.raw_values import WrongValue, each, items_of

Rows: TypeAlias = pd.DataFrame | pa.Table | pa.RecordBatch | str | Path | Iterable[Mapping[str, Any]]


MOST_PARTS = 16
"""Encoders of some of the features that are kept: requests choose which they are."""


class Encoded(NamedTuple):
    ids: np.ndarray
    """(S, B) int64."""
    lists: list[tuple[np.ndarray, np.ndarray]]
    """Ids (n,) and offsets (G + 1,) of the G lists of each list feature, int64."""
    of_rows: list[np.ndarray | None]
    """Which list each row has, (B,) int64, where rows share one; None: row k has the k-th of B."""
    dense: np.ndarray | None = None
    """(B, C) float32, the scaled numbers of dense columns, NaN where missing."""

    @property
    def rows(self) -> int:
        return self.ids.shape[1]


class Encoder:
    """Turns raw rows into ids, equal to what the preparation makes of them.

    Args:
        schema: its ``preparation`` says how lists are cut.
        folder: where its vocabularies are.
        files: those in it with a checksum: of an artifact, also the vocabularies' indexes.

    Attributes:
        columns: of each feature, in schema order, then the dense ones.
    """

    def __init__(self, schema: Schema, folder: Path, files: Collection[str] = ()) -> None:
        self.features = schema.features
        self.dense: list[DenseColumn | RowVector] = [*schema.dense, *schema.row_vectors]
        self.columns = [*(feature.encoding.column for feature in schema.features), *schema.dense_names]
        canonical = schema.preparation.get(VALUES_KEY, 1) >= VALUES
        self.to_ids = make_to_ids(schema.features, folder, canonical, files)
        self.part = lru_cache(MOST_PARTS)(self._part)
        self.sequences = schema.sequences
        settings = dict(schema.preparation.get("lists", {}))
        for sequence in schema.sequences:
            made = schema.preparation.get("sequences", {}).get(sequence.name, {})
            kept = {key: made.get(key) for key in ("max_length", "separator")}
            settings |= {name: {**kept, "keep": "last"} for name in sequence.features if made}
        self.list_settings = {
            feature.name: ListColumn.model_validate(settings.get(feature.name, {"max_length": feature.max_length}))
            for feature in schema.features
            if feature.kind == "list"
        }
        self._row_ids = self._make_row_ids()

    def _make_row_ids(self) -> RowIds:
        fields = []
        columns = self.columns[: len(self.features)]
        for feature, column, to in zip(self.features, columns, self.to_ids, strict=True):
            cut = self.list_settings.get(feature.name)
            how = (None, False) if cut is None else (cut.max_length, cut.keep == "last")
            fields.append(FieldOfRow(sys.intern(column), to.to, feature.num_embeddings, *how))
        return RowIds(fields)

    def _part(self, places: tuple[int, ...]) -> Encoder:
        """Return an encoder of some of the ``columns``, by their places: all or none of a sequence."""
        part, features = copy(self), [i for i in places if i < len(self.features)]
        part.features, part.columns = [self.features[i] for i in features], [self.columns[i] for i in places]
        part.to_ids = [self.to_ids[i] for i in features]
        part.dense = [self.dense[i - len(self.features)] for i in places if i >= len(self.features)]
        part._row_ids = part._make_row_ids()
        return part

    def encode(self, rows: Rows, first_row: int = 0) -> Encoded:
        """Return the ids of all rows.

        Args:
            first_row: what messages call the first row.

        Raises:
            UserError: no rows of a kind that is read, a column that is not there or there twice, or a value of the
                wrong type; the message names row, feature and value.
        """
        of_ids = len(self.features)
        if (found := self._of_common_types(rows)) is not None:
            names = [feature.name for feature in self.features if feature.kind == "list"]
            self._check_aligned(dict(zip(names, found.lengths, strict=True)), first_row)
            numbers = columns_of(rows, self.columns[of_ids:])[0] if self.dense else []
            return Encoded(found.singles, found.lists, [None] * len(names), self._scaled(numbers, first_row))
        given, num_rows = columns_of(rows, self.columns)
        columns, numbers = given[:of_ids], given[of_ids:]
        singles = np.empty((sum(feature.kind != "list" for feature in self.features), num_rows), np.int64)
        lists, free, outs = [], iter(singles), []
        lengths: dict[str, np.ndarray] = {}
        for place, (feature, column) in enumerate(zip(self.features, columns, strict=True)):
            try:
                if feature.kind != "list":
                    _refuse_lists(column)
                    outs.append(next(free))
                else:
                    columns[place], offsets, lengths[feature.name] = self._items(feature, column)
                    outs.append(np.empty(len(columns[place]), np.int64))
                    lists.append((outs[-1], offsets))
            except WrongValue as error:
                raise UserError(f"row {first_row + error.row}: feature {feature.name!r} {error.problem}") from None
            except ValueError as error:
                raise UserError(f"feature {feature.name!r} {error}") from None
        try:
            write_columns(self.to_ids, columns, outs)
        except WrongValue as error:
            raise self._located(error, lists, first_row) from None
        self._check_aligned(lengths, first_row)
        return Encoded(singles, lists, [None] * len(lists), self._scaled(numbers, first_row))

    def _scaled(self, columns: Sequence[Column], first_row: int) -> np.ndarray | None:
        """Return (B, C) float32 of the dense columns and vectors; None where there are none."""
        found = []
        for dense, column in zip(self.dense, columns, strict=True):
            try:
                if isinstance(dense, RowVector):
                    found.append(stacked(lists_of(column), dense))
                else:
                    found.append(scaled(numbers_of(column), dense)[:, None])
            except (WrongValue, WrongVector) as error:
                kind = "vector" if isinstance(dense, RowVector) else "dense column"
                raise UserError(f"row {first_row + error.row}: {kind} {dense.name!r} {error.problem}") from None
        return np.ascontiguousarray(np.concatenate(found, axis=1)) if found else None

    def _of_common_types(self, rows: Rows) -> RowsOfIds | None:
        """Return the ids of a list of dicts or of a table of common types, which C++ reads whole; None for others."""
        if isinstance(rows, list):
            return self._row_ids.of_dicts(rows) if rows else None
        if isinstance(rows, pa.Table):
            batches = rows.to_batches()
            if len(batches) > 1:
                batches = rows.combine_chunks().to_batches()
        else:
            batches = [rows] if isinstance(rows, pa.RecordBatch) else []
        if len(batches) != 1:
            return None
        check_columns(batches[0].schema.names, self.columns)
        return self._row_ids.of_batch(batches[0])

    def _located(self, error: WrongValue, lists: Sequence[tuple[np.ndarray, np.ndarray]], first_row: int) -> UserError:
        """Return what is wrong with a value, by its row and feature."""
        feature, row, problem = self.features[error.column], error.row, error.problem
        if feature.kind == "list":
            place = sum(other.kind == "list" for other in self.features[: error.column])
            row = int(np.searchsorted(lists[place][1], row, side="right")) - 1
            problem += " in its list"
        return UserError(f"row {first_row + row}: feature {feature.name!r} {problem}")

    def _check_aligned(self, lengths: Mapping[str, np.ndarray], first_row: int) -> None:
        """Refuse a row whose events have columns of different lengths: the k-th items of all are one event."""
        for sequence in self.sequences:
            first, *others = sequence.features
            if first not in lengths:
                continue  # a part of the features, without this sequence
            for other in others:
                wrong = lengths[first] != lengths[other]
                if wrong.any():
                    row = int(wrong.argmax())
                    raise UserError(
                        f"row {first_row + row}: sequence {sequence.name!r}: {first!r} has {lengths[first][row]}, "
                        f"{other!r} has {lengths[other][row]} items; the columns of an event must be aligned"
                    )

    def _items(self, feature: Feature, column: Column) -> tuple[Column, np.ndarray, np.ndarray]:
        """Return the kept items, where each row's begin, and how many items each row was given."""
        settings = self.list_settings[feature.name]
        if isinstance(column, pa.Array) and _is_text(column.type) and settings.separator is not None:
            column = pc.split_pattern(pc.if_else(pc.equal(column, ""), None, column), settings.separator)
        if isinstance(column, pa.Array) and not _is_list(column.type):
            column = column.to_pylist()
        if isinstance(column, pa.Array):
            wanted, offsets, lengths = _kept_of_array(column, settings)
        else:
            wanted, offsets, lengths = _kept_of_values(column, settings)
        if settings.separator is not None and isinstance(feature.encoding, LogBuckets):
            wanted = [_number(item) for item in (wanted.to_pylist() if isinstance(wanted, pa.Array) else wanted)]
        return wanted, offsets, lengths


def _kept_of_array(column: pa.Array, settings: ListColumn) -> tuple[Column, np.ndarray, np.ndarray]:
    """Return the items to keep of all rows, where each row's begin, and how many each row was given."""
    column = column.cast(pa.large_list(column.type.value_type))
    starts = column.offsets.to_numpy()[:-1]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    kept = np.minimum(lengths, settings.max_length)
    if settings.keep == "last":
        starts = starts + lengths - kept
    offsets = _offsets(kept)
    gaps = starts - offsets[:-1]
    if len(starts) and (gaps == gaps[0]).all():
        return column.values.slice(gaps[0], offsets[-1]), offsets, lengths
    return column.values.take(pa.array(np.arange(offsets[-1]) + np.repeat(gaps, kept))), offsets, lengths


def _kept_of_values(column: Sequence[Any], settings: ListColumn) -> tuple[Column, np.ndarray, np.ndarray]:
    cut = each(column, lambda value: items_of(value, settings.separator))
    most = slice(-settings.max_length, None) if settings.keep == "last" else slice(settings.max_length)
    kept = [part[most] for part in cut]
    lengths = np.array([len(part) for part in cut], dtype=np.int64)
    return list(chain.from_iterable(kept)), _offsets([len(part) for part in kept]), lengths


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


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


def _number(item: Any) -> Any:
    """Return a number cut out of a text; what is none stays, to be refused."""
    if not isinstance(item, str):
        return item
    try:
        return float(item) if item else None
    except ValueError:
        return item


def _refuse_lists(column: Column) -> None:
    if isinstance(column, pa.Array) and pa.types.is_nested(column.type):
        raise UserError(f"holds {column.type}, not single values")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
