"""Computes GAUC of any number of rows in bounded memory: of all groups while they fit, then of sampled whole groups.

A group is in the sample at rate 2**-k when its hash begins with k zero bits. So the rows of a group are kept or left
out together, wherever in the fold and on whatever rank they are; raising k only ever drops groups, so a sample that has
grown too large is thinned in place; and every evaluation samples the same groups, which makes evaluations comparable to
much better than the interval of each.

The spread within a sample says nothing of a large group that is not in it. So all rows are counted by a hash of their
group, and the interval allows any AUC to groups of more than ``LARGE`` of the rows that were left out. Where rows have
weights, rows are counted by them, for each task its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.metrics.exact import auc_of_groups, gather_rows

FEWEST_GROUPS = 30
"""Sampled groups below which their spread says too little for an interval."""
STANDARD_ERRORS = 3.0
"""Half the width of the interval: 99.7 % of normal errors."""
LARGE = 0.01
"""Share of the fold's rows that makes a group a large one."""
_BUCKETS = 2**16
_MOST_PIECES = 256


class SampledGAUC(NamedTuple):
    value: float
    bound: float
    """Half the width of the interval, 0 when no group was left out, nan when there are too few groups for one."""
    groups: int
    """Groups that count, those with both classes, in the sample."""
    rows: float
    """Rows in those groups, each counting by its weight."""


class GroupSample:
    """Keeps whole groups of a fold, at most ``max_rows`` rows on this rank.

    Rows stay on the device they come from; which ones to keep is decided by the group ids alone, on the CPU.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.num_rows, self.halvings = max_rows, 0, 0
        self._pieces: list[_Piece] = []
        self._rows_by_hash = torch.zeros(1, _BUCKETS, dtype=torch.float64)
        self._missing = np.zeros((1, _BUCKETS))

    @property
    def share(self) -> float:
        """Return the rate at which groups are sampled."""
        return 2.0**-self.halvings

    def update(self, logits: Tensor, labels: Tensor, groups: Tensor, weights: Tensor | None = None) -> None:
        """Take in a batch: ``logits``, ``labels`` and ``weights`` (B, T), ``groups (B,)`` int64 on the CPU."""
        # Broadcast: without weights there is one count for all tasks.
        self._rows_by_hash = self._rows_by_hash + _by_hash(groups, weights)
        tensors = (logits, labels.to(torch.uint8)) if weights is None else (logits, labels.to(torch.uint8), weights)
        piece = _kept((groups.numpy(), tensors), self.halvings)
        self._pieces.append(piece)
        self.num_rows += len(piece[0])
        if self.num_rows > self.max_rows:
            self._thin()
        if len(self._pieces) > _MOST_PIECES:  # small tensors would cost more than what is in them
            self._pieces = [_joined(self._pieces)]

    def _thin(self) -> None:
        while self.num_rows > self.max_rows:
            self.halvings += 1
            self._pieces = [_kept(piece, self.halvings) for piece in self._pieces]
            self.num_rows = sum(len(piece[0]) for piece in self._pieces)

    def gather(self) -> tuple[np.ndarray, ...] | None:
        """Return all ranks' sample, ``logits (N, T)``, ``labels (N, T)``, ``groups (N,)``, any ``weights (N, T)``.

        On rank 0, None elsewhere. Collective.

        Every rank has taken in at least one batch, if only one without rows.
        """
        if dist.is_initialized():
            # The strictest rank decides: the others have all rows of the groups it still has.
            halvings = torch.tensor([self.halvings])
            dist.all_reduce(halvings, dist.ReduceOp.MAX)
            dist.all_reduce(self._rows_by_hash)
            self.halvings = int(halvings)
        groups, tensors = _kept(_joined(self._pieces), self.halvings)
        logits, labels, *weights = map(gather_rows, tensors)
        gathered = gather_rows(torch.from_numpy(groups))
        if gathered is None or logits is None or labels is None:
            return None
        of_rows = [found for found in weights if found is not None]
        # The hash's last bits choose the bucket, its first ones the sample.
        in_sample = _by_hash(torch.from_numpy(gathered), torch.from_numpy(of_rows[0]) if of_rows else None)
        self._missing = (self._rows_by_hash - in_sample).numpy()
        return logits, labels, gathered, *of_rows

    def rest(self, task: int) -> tuple[np.ndarray, float]:
        """Return what the sample lacks for a task, on rank 0 after ``gather``.

        Returns:
            the rows (n,) of each large group of the fold that is not in the sample, those of small groups with the same
            hash counted in, and the rows of the whole fold; both by their weights.
        """
        row = min(task, len(self._missing) - 1)
        missing, fold_rows = self._missing[row], float(self._rows_by_hash[row].sum())
        return missing[missing > LARGE * fold_rows], fold_rows


_Piece = tuple[np.ndarray, tuple[Tensor, ...]]
"""Groups (n,); logits (n, T), labels (n, T), and weights (n, T) where there are any."""


def sampled_gauc(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    share: float,
    left_out: np.ndarray | None = None,
    fold_rows: float | None = None,
    weights: np.ndarray | None = None,
) -> SampledGAUC:
    """Return GAUC of one task from groups that were sampled at the rate ``share``, and its interval.

    The estimate is the ratio of sums over the sample. Its error has two parts: of groups like those in the sample,
    three times the usual linearised standard error for independent draws (Cochran, Sampling Techniques, 3rd ed.,
    section 6.3); of large groups left out, which may have any AUC, their whole weight or three standard errors,
    whichever is less.

    Args:
        logits: ``(N,)``, as in ``metrics.gauc``.
        labels: ``(N,)``.
        groups: ``(N,)``.
        left_out: of ``GroupSample.rest``; None: the fold has no large groups.
        fold_rows: of ``GroupSample.rest``.
        weights: ``(N,)`` of the rows, by which groups count; None: all the same.
    """
    aucs, rows = auc_of_groups(logits, labels, groups, weights)
    counts = ~np.isnan(aucs)
    aucs, rows = aucs[counts], rows[counts]
    num_rows = rows.sum().item()
    if not num_rows:
        return SampledGAUC(math.nan, math.nan, 0, 0)
    value = float((aucs * rows).sum() / num_rows)
    if share == 1.0:
        return SampledGAUC(value, 0.0, len(aucs), num_rows)
    if len(aucs) < FEWEST_GROUPS:
        return SampledGAUC(value, math.nan, len(aucs), num_rows)
    large = left_out if left_out is not None else np.zeros(0, np.int64)
    is_large = rows > LARGE * (fold_rows if fold_rows is not None else num_rows / share)
    in_fold = rows[~is_large].sum() / share + rows[is_large].sum() + large.sum()
    sampled = math.sqrt(1 - share) / share * float(np.sqrt(np.square(rows * (aucs - value)).sum()))
    any_auc = max(value, 1 - value)
    spread = STANDARD_ERRORS * math.sqrt((1 - share) / share) * float(np.sqrt(np.square(large).sum()))
    bound = (STANDARD_ERRORS * sampled + any_auc * min(float(large.sum()), spread)) / in_fold
    return SampledGAUC(value, min(bound, any_auc), len(aucs), num_rows)


def _by_hash(groups: Tensor, weights: Tensor | None) -> Tensor:
    """Return how many rows (1, _BUCKETS) have a group of each hash, or the sums of their weights (T, _BUCKETS)."""
    buckets = (hashes(groups.numpy()) % np.uint64(_BUCKETS)).astype(np.int64)
    columns = [None] if weights is None else list(weights.double().cpu().numpy().T)
    counts = [np.bincount(buckets, weights=column, minlength=_BUCKETS) for column in columns]
    return torch.from_numpy(np.stack(counts).astype(np.float64))


def _joined(pieces: list[_Piece]) -> _Piece:
    groups, tensors = zip(*pieces, strict=True)
    return np.concatenate(groups), tuple(torch.cat(of_pieces) for of_pieces in zip(*tensors, strict=True))


def _kept(piece: _Piece, halvings: int) -> _Piece:
    """Return the rows of ``piece`` whose group is sampled at the rate 2**-halvings."""
    if not halvings:
        return piece
    groups, tensors = piece
    rows = np.flatnonzero(hashes(groups) >> np.uint64(64 - halvings) == 0)
    index = torch.from_numpy(rows).to(tensors[0].device, non_blocking=True)
    return groups[rows], tuple(tensor.index_select(0, index) for tensor in tensors)


def hashes(groups: np.ndarray) -> np.ndarray:
    """Return ``(N,)`` uint64 hashes of int64 group ids: the finaliser of SplitMix64, a bijection.

    Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    z = groups.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
