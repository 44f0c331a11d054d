"""Reads parquet shards into ``Batch``: sharded over ranks by row group, shuffled, prefetched, with an exact position.

Which rows make up a global batch is decided in batch_order.py; this file reads them and lays them out as a
``KeyedJaggedTensor`` with its keys in schema order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.data.batch import Batch, hide_new_ids
from ssr_rec.data.batch_order import Lanes, Piece, lanes_of_rank, order_of_groups, runs_of, share_cut
from ssr_rec.data.blocks import Block
from ssr_rec.data.features import Feature
from ssr_rec.data.oov_dropout import OovDropout
from ssr_rec.data.row_groups import SplitFiles
from ssr_rec.data.schema import Schema
from ssr_rec.data.value_columns import ValueColumn


class Reader:
    """Reads one split of a prepared dataset as global batches, of which each rank gets its share.

    Args:
        folder: the prepared dataset.
        schema: its schema, perhaps a selection of its features and labels.
        split: "train", "validation" or "test", or a day.
        batch_size: rows of a global batch over all ranks.
        ranks: this process and how many there are.
        num_lanes: rows are dealt to this many lanes (batch_order.py); fewer than ranks means as many as those.
        seed: of the shuffle; None keeps the stored order.

    Raises:
        UserError: see ``SplitFiles``; also a batch size smaller than the number of lanes, or too few rows.
    """

    def __init__(
        self,
        folder: Path,
        schema: Schema,
        split: str,
        batch_size: int,
        ranks: tuple[int, int] = (0, 1),
        num_lanes: int = 16,
        seed: int | None = None,
    ) -> None:
        rank, world_size = ranks
        self.files, self.split = SplitFiles(folder, schema, split), split
        self.schema, self.batch_size, self.seed, self.prefetch = schema, batch_size, seed, 4
        self.new_from: dict[str, int] = {}
        self.oov_dropout: OovDropout | None = None
        self.by: ValueColumn | None = None
        self.num_lanes = max(num_lanes, world_size)
        if batch_size < self.num_lanes:
            raise UserError(
                f"batch size {batch_size} is the global one and must be at least {self.num_lanes}, the larger of "
                f"data.num_lanes and the world size {world_size}; raise the batch size or lower data.num_lanes"
            )
        check_rows(folder, schema, split, world_size)
        self.my_lanes = lanes_of_rank(self.num_lanes, rank, world_size)
        self.num_rows = schema.splits[split].num_rows
        self.steps_per_epoch = -(-self.num_rows // batch_size)

    def reading(
        self,
        prefetch: int = 4,
        hide_new: bool = False,
        oov_dropout: OovDropout | None = None,
        by: ValueColumn | None = None,
    ) -> Reader:
        """Set how batches are read, and return the reader.

        Args:
            prefetch: batches decoded ahead in a background thread.
            hide_new: take ids that the rows of this day themselves gave to values as out of vocabulary.
            oov_dropout: of training; None: every id as it is stored.
            by: for whose values evaluations give metrics as well.
        """
        self.prefetch, self.oov_dropout, self.by = prefetch, oov_dropout, by
        self.new_from = self.schema.new_from(self.split) if hide_new else {}
        return self

    def num_steps(self, epochs: int) -> int:
        return epochs * self.steps_per_epoch

    def locate(self, step: int) -> tuple[int, int]:
        return divmod(step, self.steps_per_epoch)

    def end_of(self, epoch: int) -> int:
        return (epoch + 1) * self.steps_per_epoch

    def epochs_done(self, steps: int) -> float:
        return steps / self.steps_per_epoch

    def rows_in_step(self, step: int) -> int:
        """Return rows of global batch ``step``, counted through all epochs, over all ranks."""
        return min(self.batch_size, self.num_rows - step % self.steps_per_epoch * self.batch_size)

    def position(self) -> dict[str, Any]:
        """Return what (epoch, step) must mean the same rows under."""
        return {
            "dataset_id": self.schema.dataset_id,
            "num_rows": self.num_rows,
            "batch_size": self.batch_size,
            "num_lanes": self.num_lanes,
            "shuffle_seed": self.seed,
        }

    def epoch(self, epoch: int, start_step: int = 0) -> Prefetcher:
        """Yield this rank's batches of an epoch from batch ``start_step`` on; (epoch, step) is the whole position."""
        return Prefetcher(self.batches(epoch, start_step), self.prefetch)

    def share_cut(self) -> float | None:
        return share_cut(self.schema.splits[self.split].groups, self.num_rows, self.steps_per_epoch * self.num_lanes)

    def describe(self, epoch: int, step: int, most: int = 4) -> str:
        """Return which row groups global batch ``step`` of an epoch is drawn from, over all ranks."""
        lanes, found = self._lanes(epoch), []
        for lane in range(self.num_lanes):
            wanted = lanes.lane_rows(step, lane)
            for piece in lanes.pieces(lane, step):
                if wanted <= 0:
                    break
                file, group, _ = self.files.locate(piece.group)
                found.append(f"{self.files.paths[file]} row group {group}")
                wanted -= piece.stop - piece.start
        names = list(dict.fromkeys(found))
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

    def _lanes(self, epoch: int) -> Lanes:
        num_groups = len(self.files.group_rows)
        order = np.arange(num_groups)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(num_groups)
        return Lanes(self.files.group_rows, order, self.batch_size, self.num_lanes)

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Yield what ``epoch`` prefetches."""
        lanes = self._lanes(epoch)
        # One thread decodes the block after the one that a lane is in: the lanes may need their next all at once.
        pool = ThreadPoolExecutor(1, thread_name_prefix="ssr_rec-decoder")
        cursors = [self._blocks(pool, lanes, lane, epoch, start_step) for lane in self.my_lanes]
        left: list[tuple[Block, int] | None] = [None] * len(cursors)
        try:
            for cursor in cursors:
                next(cursor)
            for step in range(start_step, lanes.num_steps):
                slices: list[tuple[Block, int, int]] = []
                for index, lane in enumerate(self.my_lanes):
                    wanted = lanes.lane_rows(step, lane)
                    while wanted:
                        block, position = left[index] or (next(cursors[index]), 0)
                        assert block is not None
                        stop = min(block.num_rows, position + wanted)
                        slices.append((block, position, stop))
                        left[index] = (block, stop) if stop < block.num_rows else None
                        wanted -= stop - position
                batch = assemble(self.schema, slices, lanes.rows_in_step(step))
                if batch.together is not None:
                    shares = [lanes.lane_rows(step, lane) for lane in self.my_lanes]
                    batch.runs = torch.from_numpy(runs_of(batch.together.numpy(), shares))
                yield hide_new_ids(batch, self.schema, self.new_from) if self.new_from else batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _blocks(
        self, pool: ThreadPoolExecutor, lanes: Lanes, lane: int, epoch: int, start_step: int
    ) -> Iterator[Block | None]:
        """Yield None once the first block of a lane is asked for; then its blocks, each asked for one ahead."""
        coming: Future[Block] | None = None
        for piece in lanes.pieces(lane, start_step):
            block = coming.result() if coming is not None else None
            coming = pool.submit(self._block, piece, epoch)
            yield block
        yield coming.result() if coming is not None else None

    def _block(self, piece: Piece, epoch: int) -> Block:
        order = None
        if self.seed is not None:
            rng = np.random.default_rng((self.seed, epoch, piece.group))
            if self.schema.together is None:
                order = rng.permutation(int(self.files.group_rows[piece.group]))
            else:
                order = order_of_groups(self.files.together(piece.group), rng)
        block = self.files.read(piece, order)
        if self.oov_dropout is not None:
            rows = np.arange(piece.stop) if order is None else order
            self.oov_dropout.apply(block, rows[piece.start : piece.stop], piece.group, epoch)
        return block


def assemble(schema: Schema, slices: Sequence[tuple[Block, int, int]], global_rows: int) -> Batch:
    """Return the batch of rows ``start:stop`` of blocks, one after the other; ``global_rows``: those of all ranks."""
    num_rows = sum(stop - start for _, start, stop in slices)
    features, labels = schema.features, np.empty((num_rows, len(schema.labels)), dtype=np.float32)
    groups = np.empty(num_rows, dtype=np.int64) if schema.group_id is not None else None
    together = np.empty(num_rows, dtype=np.int64) if schema.together is not None else None
    weights = np.empty_like(labels) if schema.has_weights else None
    dense = np.empty((num_rows, sum(schema.dense_widths)), dtype=np.float32) if schema.dense_names else None
    ends = np.cumsum([stop - start for _, start, stop in slices]).tolist()
    rows = [slice(end - (stop - start), end) for end, (_, start, stop) in zip(ends, slices, strict=True)]
    for there, (block, start, stop) in zip(rows, slices, strict=True):
        labels[there] = block.labels[start:stop]
        if groups is not None and block.group_ids is not None:
            groups[there] = block.group_ids[start:stop]
        if together is not None and block.together is not None:
            together[there] = block.together[start:stop]
        if weights is not None and block.weights is not None:
            weights[there] = block.weights[start:stop]
        if dense is not None and block.dense is not None:
            dense[there] = block.dense[start:stop]
    lengths = np.ones((len(features), num_rows), dtype=np.int64)
    items = sum(
        int(lists.offsets[stop] - lists.offsets[start]) for block, start, stop in slices for lists in block.lists
    )
    ids = np.empty(sum(f.kind != "list" for f in features) * num_rows + items, dtype=np.int64)
    item_weights: list[np.ndarray] = []
    at = scalar = listed = first = 0
    for row, feature in enumerate([*features, None]):
        if feature is not None and feature.kind != "list":
            scalar += 1
            continue
        run = ids[at : at + (scalar - first) * num_rows].reshape(scalar - first, num_rows)
        for there, (block, start, stop) in zip(rows, slices, strict=True):
            run[:, there] = block.scalars[first:scalar, start:stop]
        at, first = at + run.size, scalar
        for there, (block, start, stop) in zip(rows, slices if feature is not None else [], strict=False):
            lists = block.lists[listed]
            part = lists.ids[lists.offsets[start] : lists.offsets[stop]]
            ids[at : at + len(part)], lengths[row, there] = part, lists.lengths[start:stop]
            at += len(part)
            if lists.weights is not None:
                item_weights.append(lists.weights[lists.offsets[start] : lists.offsets[stop]])
        listed += 1
    sparse = KeyedJaggedTensor(
        keys=schema.feature_names,
        values=torch.from_numpy(ids),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=num_rows,
    )
    group_ids = torch.from_numpy(groups) if groups is not None else None
    of_tasks = torch.from_numpy(weights) if weights is not None else None
    numbers = torch.from_numpy(dense) if dense is not None else None
    of_items = _weights_of_items(features, item_weights, lengths)
    of_groups = torch.from_numpy(together) if together is not None else None
    parts = of_tasks, numbers, of_items, of_groups
    return Batch(sparse, torch.from_numpy(labels), group_ids, global_rows, *parts)


def _weights_of_items(
    features: Sequence[Feature], weights: Sequence[np.ndarray], lengths: np.ndarray
) -> KeyedJaggedTensor | None:
    """Return the weights of the features' items whose items have such; of ``lengths`` (F, B). None: there are none."""
    weighted = [row for row, feature in enumerate(features) if feature.weights is not None]
    if not weighted:
        return None
    return KeyedJaggedTensor(
        keys=[features[row].name for row in weighted],
        values=torch.from_numpy(np.concatenate([*weights, np.empty(0, np.float32)])),
        lengths=torch.from_numpy(lengths[weighted].reshape(-1)),
        stride=lengths.shape[1],
    )


def check_rows(folder: Path, schema: Schema, split: str, world_size: int) -> None:
    """Refuse a split of which some rank would get no row."""
    if schema.splits[split].num_rows < world_size:
        raise UserError(
            f"{folder}: split {split!r} has {schema.splits[split].num_rows} rows for a world size of "
            f"{world_size}; use fewer processes or more data"
        )


class Prefetcher(Iterator[Batch]):
    """Runs an iterator in a background thread, ``depth`` items ahead, and counts how long its consumer waits.

    An error in the thread is raised in the consumer. ``close`` ends the thread at any time; it also ends when the
    items do.

    Attributes:
        wait_seconds: time spent in ``next`` so far, the data wait of a training step.
    """

    def __init__(self, items: Iterator[Batch], depth: int) -> None:
        self.wait_seconds = 0.0
        self._queue: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=max(depth, 1))
        self._closed = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name="ssr_rec-reader")
        self._thread.start()

    def _run(self, items: Iterator[Batch]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            # One that is no Exception would end the consumer's process as if it had been asked to.
            self._put(error if isinstance(error, Exception) else RuntimeError(f"the reader's thread ended: {error!r}"))

    def _put(self, item: Batch | Exception | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Batch:
        if self._finished:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, Batch):
            return item
        self._finished = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        self._closed.set()
        self._finished = True
        self._thread.join()
