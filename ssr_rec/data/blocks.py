"""Parquet row groups to checked numpy arrays: the only place that trusts nothing about the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.lanes import Piece
from ssr_rec.data.shards import arrow_schema
from ssr_rec.schema import DATASET_ID_KEY, GROUP_COLUMN, SCHEMA_FILE, Schema


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
        ValueError: unknown or empty split; a shard that is missing, truncated, of another dataset, or whose
            columns or rows are not what the schema says. The message names the file and the fix.
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
        rows: list[int] = []
        for shard in schema.splits[split].shards:
            file = self._open(folder / shard.path, shard.num_rows)
            for group in range(file.metadata.num_row_groups):
                self.groups.append((len(self.files), group))
                rows.append(file.metadata.row_group(group).num_rows)
            self.files.append(file)
        self.paths = [folder / shard.path for shard in schema.splits[split].shards]
        self.group_rows = np.array(rows, dtype=np.int64)

    def _open(self, path: Path, num_rows: int) -> pq.ParquetFile:
        again = f"it does not belong to {path.parent.parent / SCHEMA_FILE}; prepare the log again"
        try:
            file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such shard; {again}") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error}); prepare the log again") from None
        found, metadata = file.schema_arrow, file.metadata
        dataset_id = (metadata.metadata or {}).get(DATASET_ID_KEY, self.schema.dataset_id.encode())
        if dataset_id.decode() != self.schema.dataset_id:
            raise ValueError(
                f"{path}: dataset id {dataset_id.decode()}, the schema's is {self.schema.dataset_id}; {again}"
            )
        for field in self.columns:
            if field.name not in found.names:
                raise ValueError(f"{path}: column {field.name!r} is missing; {again}")
            have = found.field(field.name).type
            if have != field.type and not (pa.types.is_list(have) and have.equals(field.type)):
                raise ValueError(f"{path}: column {field.name!r} holds {have}, the schema says {field.type}; {again}")
        if metadata.num_rows != num_rows:
            raise ValueError(f"{path}: {metadata.num_rows} rows, the schema says {num_rows}; {again}")
        return file

    def read(self, piece: Piece, order: np.ndarray | None) -> Block:
        """Rows ``piece.start:piece.stop`` of a row group taken in ``order`` (None: as stored).

        Raises:
            ValueError: an id out of range, a label that is not 0 or 1, a null, or undecodable bytes; the message
                names the file, the column and the row.
        """
        file, group = self.groups[piece.group]
        try:
            table = self.files[file].read_row_group(group, columns=self.columns.names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.paths[file]}: row group {group} is damaged ({error}); prepare it again") from None
        first_row = sum(self.files[file].metadata.row_group(before).num_rows for before in range(group))
        where = f"{self.paths[file]}: row group {group} (from row {first_row})"
        arrays = {name: self._column(table, name, where) for name in self.columns.names}
        rows = np.arange(table.num_rows) if order is None else order
        rows = rows[piece.start : piece.stop]
        scalars, lists = [], []
        for feature in self.schema.features:
            array = arrays[feature.name]
            ids = array.values.to_numpy() if feature.kind == "list" else array.to_numpy()
            offsets = array.offsets.to_numpy().astype(np.int64) if feature.kind == "list" else None
            self._check_ids(ids, offsets, feature.name, feature.num_embeddings, where)
            if offsets is None:
                scalars.append(ids)
            else:
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
        scalar_ids = np.stack(scalars) if scalars else np.empty((0, table.num_rows), dtype=np.int64)
        return Block(np.take(scalar_ids, rows, axis=1), lists, labels[rows].astype(np.float32), groups)

    @staticmethod
    def _column(table: pa.Table, name: str, where: str) -> pa.Array:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"{where}: column {name!r} is null at its row {row}; prepare the log again")
        return array

    @staticmethod
    def _check_ids(ids: np.ndarray, offsets: np.ndarray | None, name: str, num_embeddings: int, where: str) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= num_embeddings):
            at = int(np.argmax((ids < 0) | (ids >= num_embeddings)))
            row = at if offsets is None else int(np.searchsorted(offsets, at, side="right")) - 1
            raise ValueError(
                f"{where}: column {name!r} holds id {ids[at]} at its row {row}, its table has rows "
                f"0 to {num_embeddings - 1}; the shard does not fit its schema, prepare the log again"
            )


def _take_lists(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> Lists:
    """The lists of ``rows``, in that order."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    taken = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=taken[1:])
    # Position i of the result lies `i - taken[its row]` behind the start of its row's list.
    return Lists(ids[np.arange(taken[-1]) + np.repeat(starts - taken[:-1], lengths)], taken, lengths)
