"""Turns raw rows (mappings, pandas, Arrow, parquet files) into the arrays that ``Scorer.score_arrays`` takes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssr_rec.common.errors import UserError
from ssr_rec.data.dense import DenseColumn, RowVector, WrongVector, scaled, stacked
from ssr_rec.data.features import Feature, LogBuckets
from ssr_rec.data.preparation.spec import ListColumn
from ssr_rec.data.schema import VALUES, VALUES_KEY, Schema
from ssr_rec.kernels.row_ids import FLOATS, FieldOfRow, RowIds, RowsOfIds
from ssr_rec.serving.id_columns import Column, lists_of, make_to_ids, numbers_of, write_columns
from ssr_rec.serving.item_weights import ItemWeights
from ssr_rec.serving.raw_columns import Rows, check_columns, columns_of
from ssr_rec.serving.raw_values import WrongValue, each, items_of

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
    weights: list[np.ndarray | None] | None = None
    """Of each list feature those of its ids, (n,) float32, None where items have none; None: no feature has any."""

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
        columns: of each feature, in schema order, then the dense ones, then those of the weights of lists.
    """

    def __init__(self, schema: Schema, folder: Path, files: Collection[str] = ()) -> None:
        self.features = schema.features
        self.dense: list[DenseColumn | RowVector] = [*schema.dense, *schema.row_vectors]
        self.weights = ItemWeights(schema.features)
        self.columns = [*(feature.encoding.column for feature in schema.features), *schema.dense_names]
        self.columns += self.weights.columns
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
        for name, column in self.weights.of_columns.items():
            cut = self.list_settings[name]
            fields.append(FieldOfRow(sys.intern(column), FLOATS, 0, cut.max_length, cut.keep == "last"))
        return RowIds(fields)

    def _part(self, places: tuple[int, ...]) -> Encoder:
        """Return an encoder of some of the ``columns``, by their places: all or none of a sequence."""
        part, features = copy(self), [i for i in places if i < len(self.features)]
        part.features, part.columns = [self.features[i] for i in features], [self.columns[i] for i in places]
        part.to_ids = [self.to_ids[i] for i in features]
        first_weights = len(self.features) + len(self.dense)
        part.dense = [self.dense[i - len(self.features)] for i in places if len(self.features) <= i < first_weights]
        part.weights = ItemWeights(part.features)
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
            numbers = columns_of(rows, self.columns[of_ids : of_ids + len(self.dense)])[0] if self.dense else []
            return self._of_whole_rows(found, numbers, first_row)
        given, num_rows = columns_of(rows, self.columns)
        columns, numbers = given[:of_ids], given[of_ids : of_ids + len(self.dense)]
        weights = dict(zip(self.weights.of_columns, given[of_ids + len(self.dense) :], strict=True))
        raw: dict[str, tuple[np.ndarray, np.ndarray]] = {}
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
                    if feature.name in self.weights.marks:
                        columns[place], cut = self.weights.cut(feature.name, columns[place], offsets)
                        raw[feature.name] = cut, offsets
                    elif feature.name in weights:
                        which = self.weights.of_columns[feature.name]
                        raw[feature.name], lengths[which] = self._weights(feature, weights[feature.name])
            except WrongValue as error:
                raise UserError(f"row {first_row + error.row}: feature {feature.name!r} {error.problem}") from None
            except ValueError as error:
                raise UserError(f"feature {feature.name!r} {error}") from None
        try:
            write_columns(self.to_ids, columns, outs)
        except WrongValue as error:
            raise self._located(error, lists, first_row) from None
        self._check_aligned(lengths, first_row)
        of_items = self.weights.checked(raw, first_row)
        return Encoded(singles, lists, [None] * len(lists), self._scaled(numbers, first_row), of_items)

    def _of_whole_rows(self, found: RowsOfIds, numbers: Sequence[Column], first_row: int) -> Encoded:
        """Return what C++ has read, checked; ``numbers``: the dense columns."""
        names = [feature.name for feature in self.features if feature.kind == "list"]
        lengths = dict(zip([*names, *self.weights.columns], found.lengths, strict=True))
        self._check_aligned(lengths, first_row)
        lists, further = found.lists[: len(names)], found.lists[len(names) :]
        of_columns = zip(self.weights.of_columns, further, strict=True)
        raw = {name: (bits.view(np.float64), offsets) for name, (bits, offsets) in of_columns}
        weights = self.weights.checked(raw, first_row)
        return Encoded(found.singles, lists, [None] * len(names), self._scaled(numbers, first_row), weights)

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
        if self.weights.marks:
            return None
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

        for name, column in self.weights.of_columns.items():
            if name in lengths and (wrong := lengths[name] != lengths[column]).any():
                row = int(wrong.argmax())
                raise UserError(
                    f"row {first_row + row}: {name!r} has {lengths[name][row]} items and {column!r} "
                    f"{lengths[column][row]} weights; every item has one"
                )

    def _weights(self, feature: Feature, column: Column) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Return the weights (n,) float64 that are kept, where each row's begin, and how many each was given."""
        try:
            items, offsets, lengths = self._cut(self.list_settings[feature.name], column)
        except WrongValue as error:
            raise WrongValue(error.row, f"{error.problem} of weights") from None
        return (self.weights.numbers(feature.name, items, offsets), offsets), lengths

    def _items(self, feature: Feature, column: Column) -> tuple[Column, np.ndarray, np.ndarray]:
        """Return the kept items, where each row's begin, and how many items each row was given."""
        settings = self.list_settings[feature.name]
        wanted, offsets, lengths = self._cut(settings, column)
        if settings.separator is not None and isinstance(feature.encoding, LogBuckets):
            wanted = [_number(item) for item in (wanted.to_pylist() if isinstance(wanted, pa.Array) else wanted)]
        return wanted, offsets, lengths

    def _cut(self, settings: ListColumn, column: Column) -> tuple[Column, np.ndarray, np.ndarray]:
        """Return what ``_items`` does, of any column of lists."""
        if isinstance(column, pa.Array) and _is_text(column.type) and settings.separator is not None:
            column = pc.split_pattern(pc.if_else(pc.equal(column, ""), None, column), settings.separator)
        if isinstance(column, pa.Array) and not _is_list(column.type):
            column = column.to_pylist()
        return _kept_of_array(column, settings) if isinstance(column, pa.Array) else _kept_of_values(column, settings)


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
