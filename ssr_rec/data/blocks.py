"""Parquet row groups to checked numpy arrays: the only place that trusts nothing about the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.lanes import Piece
from ssr_rec.data.shards import arrow_schema, footer_digest
from ssr_rec.places import source
from ssr_rec.schema import DATASET_ID_KEY, GROUP_COLUMN, SCHEMA_FILE, Feature, Schema, Shard


class Lists(NamedTuple):
    """A list feature of ``n`` rows: its ids one row after another, (n + 1,) offsets into them, (n,) lengths; int64."""

    ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


@dataclass
class Block:
    """``n`` decoded rows.

    Attributes:
        scalars: (S, n) int64, single-valued features in schema order.
        lists: list features in schema order.
        labels: (n, T) float32.
        group_ids: (n,) int64 or None.
    """

    scalars: np.ndarray
    lists: list[Lists]
    labels: np.ndarray
    group_ids: np.ndarray | None

    @property
    def num_rows(self) -> int:
        return len(self.labels)


class SplitFiles:
    """The row groups of one split, checked against the schema when opened and against its id ranges when read.

    Raises:
        ValueError: unknown or empty split; a shard that is missing, damaged, not the one that was written, of another
            dataset, or whose columns or rows are not what the schema says. The message names the file and the fix.
    """

    def __init__(self, folder: Path, schema: Schema, split: str) -> None:
        if split not in schema.splits:
            raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(schema.splits)}")
        if schema.splits[split].num_rows == 0:
            raise ValueError(f"{folder}: split {split!r} is empty; prepare the log again with another split rule")
        self.schema = schema
        self.columns = arrow_schema(schema)
        self.files: list[pq.ParquetFile] = []
        self.groups: list[tuple[int, int]] = []
        self.first_rows: list[int] = []
        """Of each row group, within its file."""
        rows: list[int] = []
        for shard in schema.splits[split].shards:
            file = self._open(folder / shard.path, shard, folder / SCHEMA_FILE)
            first_row = 0
            for group in range(file.metadata.num_row_groups):
                self.groups.append((len(self.files), group))
                self.first_rows.append(first_row)
                rows.append(file.metadata.row_group(group).num_rows)
                first_row += rows[-1]
            self.files.append(file)
        self.paths = [folder / shard.path for shard in schema.splits[split].shards]
        self.group_rows = np.array(rows, dtype=np.int64)

    def _open(self, path: Path, shard: Shard, schema_file: Path) -> pq.ParquetFile:
        again = f"it does not belong to {schema_file}; prepare the log again"
        try:
            # Before a decoder sees the footer: a damaged one might crash it.
            digest = footer_digest(path)
            known = shard.footer in (None, digest)
            file = pq.ParquetFile(source(path), page_checksum_verification=True) if known else None
        except FileNotFoundError:
            raise ValueError(f"{path}: no such shard; {again}") from None
        # Not only its own errors: what stands in a file can raise anything within the decoder.
        except Exception as error:
            raise ValueError(f"{path}: not a readable parquet file ({_line(error)}); prepare the log again") from None
        if file is None:
            raise ValueError(f"{path}: damaged, or not the file that was written in its place; {again}")
        found, metadata = file.schema_arrow, file.metadata
        dataset_id = (metadata.metadata or {}).get(DATASET_ID_KEY, self.schema.dataset_id.encode())
        if dataset_id not in [known.encode() for known in self.schema.known_ids]:
            raise ValueError(
                f"{path}: dataset id {dataset_id.decode(errors='replace')}, the schema's is {self.schema.dataset_id}; "
                f"{again}"
            )
        for field in self.columns:
            if found.names.count(field.name) != 1:
                problem = "given twice" if field.name in found.names else "missing"
                raise ValueError(f"{path}: column {field.name!r} is {problem}; {again}")
            have = found.field(field.name).type
            if have != field.type and not (pa.types.is_list(have) and have.equals(field.type)):
                raise ValueError(f"{path}: column {field.name!r} holds {have}, the schema says {field.type}; {again}")
        group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if metadata.num_rows != shard.num_rows or sum(group_rows) != shard.num_rows or min(group_rows, default=0) < 0:
            raise ValueError(f"{path}: {metadata.num_rows} rows, the schema says {shard.num_rows}; {again}")
        return file

    def read(self, piece: Piece, order: np.ndarray | None) -> Block:
        """Rows ``piece.start:piece.stop`` of a row group taken in ``order`` (None: as stored).

        Raises:
            ValueError: an id out of range, a list that is too long, a label that is not 0 or 1, a null, or damaged
                bytes; the message names the file, the column and the row.
        """
        (file, group), first_row = self.groups[piece.group], self.first_rows[piece.group]
        where = f"{self.paths[file]}: row group {group} (from row {first_row})"
        try:
            table = self.files[file].read_row_group(group, columns=self.columns.names, use_threads=False)
        except Exception as error:  # as in _open
            raise ValueError(
                f"{self.paths[file]}: row group {group} is damaged ({_line(error)}); prepare it again"
            ) from None
        num_rows = int(self.group_rows[piece.group])
        arrays = {name: self._column(table, name, num_rows, where) for name in self.columns.names}
        rows = np.arange(num_rows) if order is None else order
        rows = rows[piece.start : piece.stop]
        scalars, lists = [], []
        for feature in self.schema.features:
            array = arrays[feature.name]
            if feature.kind != "list":
                ids = array.to_numpy()
                self._check_ids(ids, None, feature, where)
                scalars.append(ids)
            else:
                ids, offsets = array.values.to_numpy(), array.offsets.to_numpy().astype(np.int64)
                self._check_lists(offsets, feature, self._leaves(file, group, feature.name), where)
                self._check_ids(ids, offsets, feature, where)
                lists.append(_take_lists(ids, offsets, rows))
        labels = np.stack([arrays[label].to_numpy() for label in self.schema.labels], axis=1)
        wrong = np.argwhere((labels != 0) & (labels != 1))
        if len(wrong):
            row, task = wrong[0]
            raise ValueError(
                f"{where}: label {self.schema.labels[task]!r} is {labels[row, task]} in row {first_row + row}, "
                "must be 0 or 1; prepare the log again"
            )
        groups = arrays[GROUP_COLUMN].to_numpy()[rows] if self.schema.group_id is not None else None
        scalar_ids = np.stack(scalars) if scalars else np.empty((0, num_rows), dtype=np.int64)
        return Block(np.take(scalar_ids, rows, axis=1), lists, labels[rows].astype(np.float32), groups)

    def _leaves(self, file: int, group: int, name: str) -> int:
        """Values of a list column that the footer counts: its items, and one for each empty list; -1: not there."""
        metadata = self.files[file].metadata.row_group(group)
        columns = [metadata.column(index) for index in range(metadata.num_columns)]
        return next((column.num_values for column in columns if column.path_in_schema.startswith(f"{name}.")), -1)

    @staticmethod
    def _column(table: pa.Table, name: str, num_rows: int, where: str) -> pa.Array:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
        if len(array) != num_rows:
            raise ValueError(f"{where}: damaged, column {name!r} has {len(array)} of {num_rows} rows; prepare it again")
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"{where}: column {name!r} is null at its row {row}; prepare the log again")
        if pa.types.is_list(array.type) and array.values.null_count:
            raise ValueError(f"{where}: column {name!r} holds a null in a list; prepare the log again")
        return array

    @staticmethod
    def _check_ids(ids: np.ndarray, offsets: np.ndarray | None, feature: Feature, where: str) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= feature.num_embeddings):
            at = int(np.argmax((ids < 0) | (ids >= feature.num_embeddings)))
            row = at if offsets is None else int(np.searchsorted(offsets, at, side="right")) - 1
            raise ValueError(
                f"{where}: column {feature.name!r} holds id {ids[at]} at its row {row}, its table has rows "
                f"0 to {feature.num_embeddings - 1}; the shard does not fit its schema, prepare the log again"
            )

    @staticmethod
    def _check_lists(offsets: np.ndarray, feature: Feature, leaves: int, where: str) -> None:
        lengths = np.diff(offsets)
        if feature.max_length is not None and len(lengths) and lengths.max() > feature.max_length:
            row = int(np.argmax(lengths))
            raise ValueError(
                f"{where}: column {feature.name!r} holds {lengths[row]} ids at its row {row}, its max_length is "
                f"{feature.max_length}; the shard does not fit its schema, prepare the log again"
            )
        # No checksum covers the count of values before each page; one too small only drops the last id.
        if offsets[-1] - offsets[0] + np.count_nonzero(lengths == 0) != leaves:
            raise ValueError(f"{where}: damaged, column {feature.name!r} lacks ids; prepare it again")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _take_lists(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> Lists:
    """The lists of ``rows``, in that order."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    taken = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=taken[1:])
    # Position i of the result lies `i - taken[its row]` behind the start of its row's list.
    return Lists(ids[np.arange(taken[-1]) + np.repeat(starts - taken[:-1], lengths)], taken, lengths)
