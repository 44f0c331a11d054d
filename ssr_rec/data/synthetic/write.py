"""Writes a planted click log of any size as a prepared dataset, together with the best AUC and logloss possible.

Blocks of rows are drawn in threads and written in order, so memory does not depend on the number of rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import canonical_json
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import GROUP_COLUMN, SPLITS, Ceiling, Schema
from ssr_rec.data.shards import arrow_schema, new_folder, row_group_rows, write_shards
from ssr_rec.data.splits import Split
from ssr_rec.data.synthetic.config import USER, SyntheticConfig
from ssr_rec.data.synthetic.fields import Column
from ssr_rec.data.synthetic.truth import BLOCK_ROWS, LABELS, DrawnRows, Truth, build_truth, draw_block

__all__ = ["SyntheticConfig", "build_truth", "draw_block", "ensure_synthetic", "write_synthetic"]

GENERATOR_VERSION = 1
"""Raise it when the same config would draw other rows: drawn logs are then not taken for new ones."""

_MOST_THREADS = 8

Progress = Callable[[int, int], None]


def ensure_synthetic(config: SyntheticConfig, root: Path, progress: Progress | None = None) -> Path:
    """Return the folder ``root/synthetic-<digest of the config>``, drawn at the first call and reused afterwards.

    Processes of one host that call it together draw once: the others wait. ``progress`` is as in `write_synthetic`.

    Raises:
        UserError: the folder is there but is not this config's log.
    """
    folder = Path(root) / f"synthetic-{_digest(config)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            write_synthetic(config, folder, progress)
    if Schema.read(folder).preparation != _preparation(config):
        raise UserError(f"{folder}: holds another log than its name says; remove it to have it drawn again")
    return folder


def write_synthetic(config: SyntheticConfig, folder: Path, progress: Progress | None = None) -> Schema:
    """Draw the log of ``config`` into the new ``folder`` and return its schema.

    Args:
        progress: called after each block with (rows written, rows in all splits together).

    Raises:
        UserError: ``folder`` exists and is not empty.
    """
    with new_folder(Path(folder)) as work:
        truth = build_truth(config)
        schema = _empty_schema(truth)
        rows_of = {"train": config.train_rows, "validation": config.validation_rows, "test": config.test_rows}
        splits, ceilings = {}, {}
        rows_before = 0
        for split in SPLITS:
            tallies = {label: Tally() for label in LABELS}
            batches = _batches(truth, split, rows_of[split], tallies)
            if progress is not None:
                batches = _reporting(batches, progress, rows_before, sum(rows_of.values()))
            shards = write_shards(batches, arrow_schema(schema), work, split, row_group_rows(rows_of[split]))
            rates = {label: tally.positive_rate for label, tally in tallies.items()}
            splits[split] = Split(num_rows=rows_of[split], positive_rate=rates, shards=shards)
            ceilings[split] = {label: tally.ceiling() for label, tally in tallies.items() if tally.has_both_classes}
            rows_before += rows_of[split]
        schema = schema.model_copy(update={"splits": splits, "ceiling": ceilings})
        schema.write(work)
    return schema


class Tally:
    """Streams (probability, outcome) of one label and gives what the probabilities reach, in constant memory.

    The AUC counts two rows of the same of ``BINS`` equal bins of probability as a tie, which is exact up to
    `auc_error`. The logloss is an exact sum.
    """

    BINS = 65_536

    def __init__(self) -> None:
        self._counts = np.zeros((2, self.BINS), np.int64)
        self._nats = 0.0

    def add(self, probabilities: np.ndarray, outcomes: np.ndarray) -> None:
        """Take in (rows,) float64 in (0, 1) and (rows,) of 0 and 1."""
        bins = np.minimum((probabilities * self.BINS).astype(np.int64), self.BINS - 1)
        self._counts[1] += (positive := np.bincount(bins[outcomes == 1], minlength=self.BINS))
        self._counts[0] += np.bincount(bins, minlength=self.BINS) - positive
        self._nats -= float(np.log(np.where(outcomes == 1, probabilities, 1 - probabilities)).sum())

    @property
    def positive_rate(self) -> float:
        return int(self._counts[1].sum()) / int(self._counts.sum())

    @property
    def has_both_classes(self) -> bool:
        """Return whether there is an AUC."""
        return bool(self._counts.any(axis=1).all())

    @property
    def auc_error(self) -> float:
        """Return a bound on |AUC - exact AUC|: half of the (positive, negative) pairs that share a bin."""
        negative, positive = self._counts.astype(np.float64)
        return float(negative @ positive / (2 * negative.sum() * positive.sum()))

    def ceiling(self) -> Ceiling:
        negative, positive = self._counts.astype(np.float64)
        below = np.cumsum(negative) - negative
        auc = positive @ (below + negative / 2) / (negative.sum() * positive.sum())
        return Ceiling(auc=float(auc), logloss=self._nats / int(self._counts.sum()))


def _batches(truth: Truth, split: str, rows: int, tallies: dict[str, Tally]) -> Iterator[pa.RecordBatch]:
    sizes = [min(BLOCK_ROWS, rows - start) for start in range(0, rows, BLOCK_ROWS)]

    def draw(index: int) -> DrawnRows:
        return draw_block(truth, split, index, sizes[index])

    for block in _in_order(draw, len(sizes)):
        for label, tally in tallies.items():
            tally.add(block.probabilities[label], block.labels[label])
        yield _record_batch(truth.columns, block)


def _in_order(draw: Callable[[int], DrawnRows], count: int) -> Iterator[DrawnRows]:
    """Yield ``draw(0) ... draw(count - 1)``, drawn a little ahead in threads (numpy releases the GIL)."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[DrawnRows]] = deque()
        for index in range(count):
            ahead.append(pool.submit(draw, index))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _record_batch(columns: tuple[Column, ...], block: DrawnRows) -> pa.RecordBatch:
    arrays: dict[str, Any] = {name: pa.array(ids) for name, ids in block.fields.ids.items()}
    for column in columns:
        if column.kind == "list":
            offsets = pa.array(block.fields.offsets.astype(np.int32))
            arrays[column.name] = pa.ListArray.from_arrays(offsets, pa.array(block.fields.history))
    arrays |= {label: pa.array(outcomes) for label, outcomes in block.labels.items()}
    arrays[GROUP_COLUMN] = arrays[USER]
    return pa.RecordBatch.from_pydict(arrays)


def _reporting(
    batches: Iterator[pa.RecordBatch], progress: Progress, done: int, total: int
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch
        done += batch.num_rows
        progress(done, total)


def _empty_schema(truth: Truth) -> Schema:
    features = [
        Feature(
            name=column.name,
            kind=column.kind,
            num_embeddings=column.own.size,
            encoding=Drawn(column=column.name),
            max_length=truth.config.history_length if column.kind == "list" else None,
        )
        for column in truth.columns
    ]
    return Schema(
        name="synthetic",
        dataset_id=_digest(truth.config),
        features=features,
        labels=list(LABELS),
        group_id=USER,
        splits={},
        preparation=_preparation(truth.config),
    )


def _preparation(config: SyntheticConfig) -> dict[str, Any]:
    return {"preset": "synthetic", "generator_version": GENERATOR_VERSION, "config": config.model_dump()}


def _digest(config: SyntheticConfig) -> str:
    return hashlib.sha256(canonical_json(_preparation(config))).hexdigest()[:16]
