"""Defines one batch of a click log, as this rank sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ssr_rec.data.features import Vocabulary
from ssr_rec.data.schema import Schema


@dataclass
class Batch(Pipelineable):
    """Holds this rank's ``B`` rows of a global batch.

    Attributes:
        sparse: every feature, single- and multi-valued, int64 ids, keys in schema order.
        labels: (B, T) float32 of 0 and 1, or of numbers, tasks in schema order; 0 where not observed.
        group_ids: (B,) int64, the users of GAUC, or None.
        global_rows: rows of the global batch over all ranks. The loss is a sum divided by this, so that it and
            its gradient do not depend on how the rows are spread; B may differ between ranks and may be 0.
        weights: (B, T) float32 of each row for each task, 0 where its label is not observed; None: all rows count the
            same. The loss is then divided by the sums of weights over all ranks instead.
        dense: (B, C) float32, NaN where missing: the scaled numbers of dense columns, then the vectors of rows, each in
            schema order; None: there are none.
        item_weights: of list features whose items have weights, keys in schema order, a float32 value for each id;
            None: there are none.
        together: (B,) int64 ids of the groups whose rows lie together, or None.
        runs: (B,) int64 numbers from 0 of the runs of rows of one group, among which losses within groups compare;
            None where there is no ``together``.
    """

    sparse: KeyedJaggedTensor
    labels: Tensor
    group_ids: Tensor | None
    global_rows: int
    weights: Tensor | None = None
    dense: Tensor | None = None
    item_weights: KeyedJaggedTensor | None = None

    @property
    def inputs(self) -> tuple[KeyedJaggedTensor, Tensor | None, KeyedJaggedTensor | None]:
        """Return what a model computes its logits of."""
        return self.sparse, self.dense, self.item_weights

    together: Tensor | None = None
    runs: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(
            sparse=self.sparse.to(device=device, non_blocking=non_blocking),
            labels=self.labels.to(device=device, non_blocking=non_blocking),
            # Ids of groups only ever go to the metrics, on the CPU.
            group_ids=self.group_ids,
            global_rows=self.global_rows,
            weights=None if self.weights is None else self.weights.to(device=device, non_blocking=non_blocking),
            dense=self.dense.to(device=device, non_blocking=non_blocking) if self.dense is not None else None,
            item_weights=None
            if self.item_weights is None
            else self.item_weights.to(device=device, non_blocking=non_blocking),
            together=self.together,
            runs=self.runs.to(device=device, non_blocking=non_blocking) if self.runs is not None else None,
        )

    def pin_memory(self) -> Batch:
        weights = None if self.weights is None else self.weights.pin_memory()
        dense = None if self.dense is None else self.dense.pin_memory()
        sparse, labels = self.sparse.pin_memory(), self.labels.pin_memory()
        of_items = None if self.item_weights is None else self.item_weights.pin_memory()
        runs = None if self.runs is None else self.runs.pin_memory()
        parts = weights, dense, of_items, self.together, runs
        return Batch(sparse, labels, self.group_ids, self.global_rows, *parts)

    def record_stream(self, stream: torch.Stream) -> None:
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)
        if self.weights is not None:
            self.weights.record_stream(stream)
        if self.dense is not None:
            self.dense.record_stream(stream)
        if self.item_weights is not None:
            self.item_weights.record_stream(stream)
        if self.runs is not None:
            self.runs.record_stream(stream)


def hide_new_ids(batch: Batch, schema: Schema, new_from: Mapping[str, int]) -> Batch:
    """Return the batch, changed in place: ids from ``new_from`` on (feature -> id) are out of vocabulary.

    ``training/datasets.py`` asks for it in evaluations, so that a day is judged as it would be served: values that
    its own rows gave ids to had none the day before.
    """
    values, ends = batch.sparse.values(), batch.sparse.offset_per_key()
    for place, feature in enumerate(schema.features):
        if feature.name in new_from:
            assert isinstance(feature.encoding, Vocabulary)
            ids = values[ends[place] : ends[place + 1]]
            ids[ids >= new_from[feature.name]] = feature.encoding.oov_id
    return batch


def row_keys(
    sparse: KeyedJaggedTensor, dense: Tensor | None = None, item_weights: KeyedJaggedTensor | None = None
) -> Tensor:
    """Return a 64-bit hash (B,) int64 of each row's inputs, lists in their order: rows of equal ones have equal keys.

    Args:
        dense: (B, C) float32, see ``Batch``.
        item_weights: see ``Batch``.
    """
    lengths = sparse.lengths().view(len(sparse.keys()), -1)
    keys = torch.zeros(lengths.shape[1], dtype=torch.int64)
    for feature, (ids, counts) in enumerate(zip(sparse.values().split(sparse.length_per_key()), lengths, strict=True)):
        # int64 arithmetic wraps around; each id is mixed with its feature, and with its place in a list.
        seed = (feature + 1) * _GOLDEN % 2**63
        if bool((counts == 1).all()):
            keys += _mixed(ids + seed)
            continue
        keys += _of_lists(_mixed(ids + seed), counts)
    if item_weights is not None:
        counts_of = item_weights.lengths().view(len(item_weights.keys()), -1)
        parts = item_weights.values().view(torch.int32).long().split(item_weights.length_per_key())
        for place, (bits, counts) in enumerate(zip(parts, counts_of, strict=True)):
            keys += _of_lists(_mixed(bits - (place + 1) * _GOLDEN % 2**63), counts)
    if dense is not None:
        seeds = torch.arange(len(lengths) + 1, len(lengths) + 1 + dense.shape[1]) * _GOLDEN
        keys += _mixed(dense.contiguous().view(torch.int32).long() + seeds).sum(1)
    return keys


def _of_lists(items: Tensor, counts: Tensor) -> Tensor:
    """Return a hash (B,) of the lists of ``counts`` (B,) items, which depends on their order; of one item, the item."""
    rows = torch.repeat_interleave(counts)
    places = torch.arange(len(items)) - (torch.cumsum(counts, 0) - counts)[rows]
    placed = torch.where(places > 0, _mixed(items + places), items)
    return torch.zeros(len(counts), dtype=torch.int64).index_add_(0, rows, placed)


def _mixed(x: Tensor) -> Tensor:
    """Return x (int64) with its bits spread over all 64, as the finaliser of splitmix64 does."""
    # Torch shifts copies of the sign in, which would cancel it and make two numbers one: they are masked.
    x = (x ^ (x >> 30 & 2**34 - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & 2**37 - 1)) * -7723592293110705685
    return x ^ (x >> 31 & 2**33 - 1)


_GOLDEN = 0x1E3779B97F4A7C15
