"""Reads parquet row groups into checked numpy arrays: the only place that trusts nothing about the files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import source
from ssr_rec.data.batch_order import Piece
from ssr_rec.data.blocks import Block, Lists
from ssr_rec.data.dense import WrongVector, scaled, stacked
from ssr_rec.data.features import Feature
from ssr_rec.data.item_weights import stored_weights
from ssr_rec.data.schema import DATASET_ID_KEY, GROUP_COLUMN, NOT_OBSERVED, SCHEMA_FILE, WEIGHT_COLUMN, Schema
from ssr_rec.data.shards import arrow_schema, footer_digest
from ssr_rec.data.splits import Shard

OPEN_FILES = 8
"""Shards kept open at once by a rank, 6 MB each with their footers; to open one takes 3 ms, a row group 30."""


class SplitFiles:
    """Reads the row groups of one split, checked against the schema when opened and against its id ranges when read.

    At most ``OPEN_FILES`` shards are open. Of a split with more, the footers are compared with their digests at once,
    and what stands in them with the schema when a shard is opened.

    Attributes:
        paths: of the shards.
        group_rows: (G,) rows of every row group, shard after shard.

    Raises:
        UserError: unknown or empty split; a shard that is missing, damaged, not the one that was written, of another
            dataset, or whose columns or rows are not what the schema says. The message names the file and the fix.
    """

    def __init__(self, folder: Path, schema: Schema, split: str) -> None:
        if split not in schema.splits:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(schema.splits)}")
        if schema.splits[split].num_rows == 0:
            raise UserError(f"{folder}: split {split!r} is empty; prepare the log again with another split rule")
        self.schema, self.schema_file = schema, folder / SCHEMA_FILE
        self.columns = arrow_schema(schema)
        self.ids = np.int32 if all(f.num_embeddings <= 2**31 for f in schema.features) else np.int64
        self.shards = schema.splits[split].shards
        self.paths = [folder / shard.path for shard in self.shards]
        self._open_files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()
        rows: list[np.ndarray] = []
        for file, shard in enumerate(self.shards):
            if shard.group_rows is None or shard.footer is None or len(self.shards) <= OPEN_FILES:
                rows.append(_group_rows(self._file(file)))
            else:
                self._check_footer(self.paths[file], shard)
                rows.append(_even_groups(shard.num_rows, shard.group_rows))
        self.group_rows = np.concatenate(rows)
        self._first_groups = np.cumsum([0, *(len(groups) for groups in rows)])

    def locate(self, group: int) -> tuple[int, int, int]:
        """Return the shard that a row group is in, its number there, and the number of its first row there."""
        file = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        first = int(self._first_groups[file])
        return file, group - first, int(self.group_rows[first:group].sum())

    def _file(self, file: int) -> pq.ParquetFile:
        with self._lock:
            if file in self._open_files:
                self._open_files.move_to_end(file)
                return self._open_files[file]
            found = self._open(self.paths[file], self.shards[file])
            self._open_files[file] = found
            if len(self._open_files) > OPEN_FILES:
                # Closed with its last reference: another thread may be reading it.
                self._open_files.popitem(last=False)
            return found

    def _check_footer(self, path: Path, shard: Shard) -> None:
        # Before a decoder sees the footer: a damaged one might crash it.
        again = f"it does not belong to {self.schema_file}; prepare the log again"
        try:
            same = shard.footer in (None, footer_digest(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such shard; {again}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable parquet file ({_line(error)}); prepare the log again") from None
        if not same:
            raise UserError(f"{path}: damaged, or not the file that was written in its place; {again}")

    def _open(self, path: Path, shard: Shard) -> pq.ParquetFile:
        again = f"it does not belong to {self.schema_file}; prepare the log again"
        self._check_footer(path, shard)
        try:
            file = pq.ParquetFile(source(path), page_checksum_verification=True)
        # Not only its own errors: what stands in a file can raise anything within the decoder.
        except Exception as error:
            raise UserError(f"{path}: not a readable parquet file ({_line(error)}); prepare the log again") from None
        found, metadata = file.schema_arrow, file.metadata
        dataset_id = (metadata.metadata or {}).get(DATASET_ID_KEY, self.schema.dataset_id.encode())
        if dataset_id not in [known.encode() for known in (*self.schema.known_ids, *self.schema.shard_ids)]:
            raise UserError(
                f"{path}: dataset id {dataset_id.decode(errors='replace')}, the schema's is {self.schema.dataset_id}; "
                f"{again}"
            )
        for field in self.columns:
            if found.names.count(field.name) != 1:
                problem = "given twice" if field.name in found.names else "missing"
                raise UserError(f"{path}: column {field.name!r} is {problem}; {again}")
            have = found.field(field.name).type
            if have != field.type and not (pa.types.is_list(have) and have.equals(field.type)):
                raise UserError(f"{path}: column {field.name!r} holds {have}, the schema says {field.type}; {again}")
        rows = _group_rows(file)
        if metadata.num_rows != shard.num_rows or rows.sum() != shard.num_rows or rows.min(initial=0) < 0:
            raise UserError(f"{path}: {metadata.num_rows} rows, the schema says {shard.num_rows}; {again}")
        if shard.group_rows is not None and rows.tolist() != _even_groups(shard.num_rows, shard.group_rows).tolist():
            raise UserError(f"{path}: its row groups are not of {shard.group_rows} rows as the schema says; {again}")
        return file

    def read(self, piece: Piece, order: np.ndarray | None) -> Block:
        """Return rows ``piece.start:piece.stop`` of a row group taken in ``order`` (None: as stored).

        Raises:
            UserError: an id out of range, a list that is too long, a label that is not 0 or 1, a weight that is not
                finite or negative, a null, or damaged bytes; the message names the file, the column and the row.
        """
        file, group, first_row = self.locate(piece.group)
        where = f"{self.paths[file]}: row group {group} (from row {first_row})"
        opened = self._file(file)
        table = self._table(opened, group, self.columns.names, f"{self.paths[file]}: row group {group}")
        num_rows = int(self.group_rows[piece.group])
        rows = np.arange(num_rows) if order is None else order
        rows = rows[piece.start : piece.stop]
        lists: list[Lists] = []
        singles = sum(feature.kind != "list" for feature in self.schema.features)
        scalars, narrow = np.empty((singles, len(rows)), self.ids), np.empty(num_rows, self.ids)
        single = iter(scalars)
        for feature in self.schema.features:
            array = self._column(table, feature.name, num_rows, where)
            if feature.kind != "list":
                ids = array.to_numpy()
                # Before they are made narrow, which would wrap.
                self._check_ids(ids, None, feature, where)
                narrow[:] = ids
                # The rows are ours; to look for negative ones takes longer than the rest.
                np.take(narrow, rows, out=next(single), mode="clip")
            else:
                ids, offsets = array.values.to_numpy(), array.offsets.to_numpy().astype(np.int64)
                self._check_lists(offsets, feature, _leaves(opened, group, feature.name), where)
                self._check_ids(ids, offsets, feature, where)
                weights = None
                if feature.weights is not None:
                    weights = self._weights(opened, group, table, feature, offsets, where)
                lists.append(Lists(ids.astype(self.ids), offsets, np.diff(offsets), weights).taken(rows))
        labels, weights = self._labels(table, rows, num_rows, where, first_row)
        groups, together = (
            None if name is None else self._column(table, name, num_rows, where).to_numpy()[rows]
            for name in (self.schema.group_id and GROUP_COLUMN, self.schema.together_column)
        )
        return Block(scalars, lists, labels, groups, weights, self._dense(table, rows, where), together)

    def together(self, group: int) -> np.ndarray:
        """Return the ids (n,) of the groups whose rows lie together, of a row group as it is stored.

        Raises:
            UserError: the file is damaged.
        """
        file, number, _ = self.locate(group)
        name = str(self.schema.together_column)
        where = f"{self.paths[file]}: row group {number}"
        table = self._table(self._file(file), number, [name], where)
        return self._column(table, name, int(self.group_rows[group]), where).to_numpy()

    @staticmethod
    def _table(file: pq.ParquetFile, group: int, columns: list[str], where: str) -> pa.Table:
        try:
            return file.read_row_group(group, columns=columns, use_threads=False)
        except Exception as error:  # as in _open
            raise UserError(f"{where} is damaged ({_line(error)}); prepare it again") from None

    def _labels(
        self, table: pa.Table, rows: np.ndarray, num_rows: int, where: str, first_row: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the labels and the weights of ``rows`` of a row group, as ``Block`` has them."""
        labels = np.empty((len(rows), len(self.schema.labels)), dtype=np.float32)
        weights = np.ones_like(labels) if self.schema.has_weights else None
        if weights is not None and self.schema.weight is not None:
            of_rows = self._column(table, WEIGHT_COLUMN, num_rows, where).to_numpy()
            if wrong := np.flatnonzero(~(np.isfinite(of_rows) & (of_rows >= 0))).tolist():
                raise UserError(
                    f"{where}: the weight is {of_rows[wrong[0]]} in row {first_row + wrong[0]}, must be finite and not "
                    "negative; prepare the log again"
                )
            weights[:] = of_rows[rows, None]
        for task, label in enumerate(self.schema.labels):
            outcomes = self._column(table, label, num_rows, where).to_numpy(zero_copy_only=False)
            may_miss, is_number = label in self.schema.missing_labels, self.schema.number(label) is not None
            missing = (np.isnan(outcomes) if is_number else outcomes == NOT_OBSERVED) if may_miss else None
            if missing is not None and weights is not None:
                outcomes = np.where(missing, 0, outcomes).astype(outcomes.dtype)
                weights[missing[rows], task] = 0
            odd = ~np.isfinite(outcomes) if is_number else outcomes.view(np.uint8) > 1
            if wrong := np.flatnonzero(odd).tolist():
                raise UserError(
                    f"{where}: label {label!r} is {outcomes[wrong[0]]} in row {first_row + wrong[0]}, must be "
                    f"{'finite' if is_number else '0 or 1'}; prepare the log again"
                )
            labels[:, task] = outcomes[rows]
        return labels, weights

    def _dense(self, table: pa.Table, rows: np.ndarray, where: str) -> np.ndarray | None:
        """Return the dense columns (n, C) of ``rows``, scaled."""
        if not self.schema.dense_names:
            return None
        found = np.empty((len(rows), sum(self.schema.dense_widths)), dtype=np.float32)
        for place, column in enumerate(self.schema.dense):
            array = self._column(table, column.name, table.num_rows, where)
            numbers = array.to_numpy(zero_copy_only=False)[rows]
            if np.isinf(numbers).any():
                raise UserError(f"{where}: dense column {column.name!r} holds an infinite number; prepare it again")
            found[:, place] = scaled(numbers, column)
        at = len(self.schema.dense)
        for vector in self.schema.row_vectors:
            array = self._column(table, vector.name, table.num_rows, where)
            try:
                found[:, at : at + vector.dim] = stacked(array, vector)[rows]
            except WrongVector as error:
                raise UserError(f"{where}: column {vector.name!r}: {error}; prepare the log again") from None
            at += vector.dim
        return found

    def _weights(
        self, opened: pq.ParquetFile, group: int, table: pa.Table, feature: Feature, offsets: np.ndarray, where: str
    ) -> np.ndarray:
        """Return the weights (n,) float32 of a list feature's items, which lie as its ids with these ``offsets``."""
        name = stored_weights(feature.name)
        array = self._column(table, name, table.num_rows, where)
        weights, own = array.values.to_numpy(), array.offsets.to_numpy().astype(np.int64)
        self._check_lists(own, feature, _leaves(opened, group, name), where)
        if not np.array_equal(np.diff(own), np.diff(offsets)) or own[0] != offsets[0]:
            raise UserError(f"{where}: column {name!r} has not one weight for each id; prepare the log again")
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            row = int(np.searchsorted(offsets, int(wrong.argmax()), side="right")) - 1
            raise UserError(
                f"{where}: column {name!r} holds {weights[wrong][0]} at its row {row}, must be finite and not "
                "negative; prepare the log again"
            )
        return weights

    @staticmethod
    def _column(table: pa.Table, name: str, num_rows: int, where: str) -> pa.Array:
        chunks = table.column(name)
        # Combining copies, also what is in one piece.
        array = chunks.chunk(0) if chunks.num_chunks == 1 else pa.concat_arrays(chunks.chunks or [_empty(chunks.type)])
        if len(array) != num_rows:
            raise UserError(f"{where}: damaged, column {name!r} has {len(array)} of {num_rows} rows; prepare it again")
        if array.null_count and not pa.types.is_floating(array.type):
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(f"{where}: column {name!r} is null at its row {row}; prepare the log again")
        if pa.types.is_list(array.type) and array.values.null_count:
            raise UserError(f"{where}: column {name!r} holds a null in a list; prepare the log again")
        return array

    @staticmethod
    def _check_ids(ids: np.ndarray, offsets: np.ndarray | None, feature: Feature, where: str) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= feature.num_embeddings):
            at = int(np.argmax((ids < 0) | (ids >= feature.num_embeddings)))
            row = at if offsets is None else int(np.searchsorted(offsets, at, side="right")) - 1
            raise UserError(
                f"{where}: column {feature.name!r} holds id {ids[at]} at its row {row}, its table has rows "
                f"0 to {feature.num_embeddings - 1}; the shard does not fit its schema, prepare the log again"
            )

    @staticmethod
    def _check_lists(offsets: np.ndarray, feature: Feature, leaves: int, where: str) -> None:
        lengths = np.diff(offsets)
        if feature.max_length is not None and len(lengths) and lengths.max() > feature.max_length:
            row = int(np.argmax(lengths))
            raise UserError(
                f"{where}: column {feature.name!r} holds {lengths[row]} ids at its row {row}, its max_length is "
                f"{feature.max_length}; the shard does not fit its schema, prepare the log again"
            )
        # No checksum covers the count of values before each page; one too small only drops the last id.
        if offsets[-1] - offsets[0] + np.count_nonzero(lengths == 0) != leaves:
            raise UserError(f"{where}: damaged, column {feature.name!r} lacks ids; prepare it again")


def _group_rows(file: pq.ParquetFile) -> np.ndarray:
    """Return (G,) rows of the row groups as the footer says."""
    metadata = file.metadata
    return np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64)


def _even_groups(num_rows: int, group_rows: int) -> np.ndarray:
    """Return (G,) row groups of ``group_rows`` rows, the last perhaps shorter."""
    starts = np.arange(0, num_rows, group_rows, dtype=np.int64)
    return np.minimum(group_rows, num_rows - starts)


def _leaves(file: pq.ParquetFile, group: int, name: str) -> int:
    """Return values of a list column that the footer counts: its items, and one for each empty list; -1: not there."""
    metadata = file.metadata.row_group(group)
    columns = [metadata.column(index) for index in range(metadata.num_columns)]
    return next((column.num_values for column in columns if column.path_in_schema.startswith(f"{name}.")), -1)


def _empty(kind: pa.DataType) -> pa.Array:
    return pa.array([], type=kind)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
