"""Computes GAUC of any number of rows in bounded memory: of all groups while they fit, then of sampled whole groups.

A group is in the sample at rate 2**-k when its hash begins with k zero bits. So the rows of a group are kept or left
out together, wherever in the fold and on whatever rank they are; raising k only ever drops groups, so a sample that has
grown too large is thinned in place; and every evaluation samples the same groups, which makes evaluations comparable to
much better than the interval of each.

The spread within a sample says nothing of a large group that is not in it. So all rows are counted by a hash of their
group, and the interval allows any AUC to groups of more than ``LARGE`` of the rows that were left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.metrics.exact import auc_of_groups, gather_predictions

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
    rows: int
    """Rows in those groups."""


class GroupSample:
    """Keeps whole groups of a fold, at most ``max_rows`` rows on this rank.

    Rows stay on the device they come from; which ones to keep is decided by the group ids alone, on the CPU.

    Attributes:
        left_out: on rank 0 after ``gather``, rows (n,) of each large group of the fold that is not in the sample, those
            of small groups with the same hash counted in.
        fold_rows: on rank 0 after ``gather``, rows of the whole fold.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.num_rows, self.halvings = max_rows, 0, 0
        self._pieces: list[tuple[np.ndarray, Tensor, Tensor]] = []
        self._rows_by_hash = torch.zeros(_BUCKETS, dtype=torch.int64)
        self.left_out, self.fold_rows = np.zeros(0, np.int64), 0

    @property
    def share(self) -> float:
        """Return the rate at which groups are sampled."""
        return 2.0**-self.halvings

    def update(self, logits: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Take in a batch: ``logits (B, T)``, ``labels (B, T)``, ``groups (B,)`` int64 on the CPU."""
        self._rows_by_hash += torch.from_numpy(_by_hash(groups.numpy()))
        piece = _kept((groups.numpy(), logits, labels.to(torch.uint8)), self.halvings)
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
            self.num_rows = sum(len(groups) for groups, _, _ in self._pieces)

    def gather(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return all ranks' sample, ``logits (N, T)``, ``labels (N, T)``, ``groups (N,)``, on rank 0. Collective.

        Every rank has taken in at least one batch, if only one without rows.
        """
        if dist.is_initialized():
            # The strictest rank decides: the others have all rows of the groups it still has.
            halvings = torch.tensor([self.halvings])
            dist.all_reduce(halvings, dist.ReduceOp.MAX)
            dist.all_reduce(self._rows_by_hash)
            self.halvings = int(halvings)
        groups, logits, labels = _kept(_joined(self._pieces), self.halvings)
        gathered = gather_predictions(logits, labels, torch.from_numpy(groups))
        if gathered is None or gathered[2] is None:
            return None
        # The hash's last bits choose the bucket, its first ones the sample.
        missing = self._rows_by_hash.numpy() - _by_hash(gathered[2])
        self.fold_rows = int(self._rows_by_hash.sum())
        self.left_out = missing[missing > LARGE * self.fold_rows]
        return gathered[0], gathered[1], gathered[2]


def sampled_gauc(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    share: float,
    left_out: np.ndarray | None = None,
    fold_rows: int | None = None,
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
        left_out: of a ``GroupSample``; None: the fold has no large groups.
        fold_rows: of a ``GroupSample``.
    """
    aucs, rows = auc_of_groups(logits, labels, groups)
    counts = ~np.isnan(aucs)
    aucs, rows = aucs[counts], rows[counts]
    num_rows = int(rows.sum())
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


def _by_hash(groups: np.ndarray) -> np.ndarray:
    """Return how many rows ``(_BUCKETS,)`` have a group of each hash."""
    return np.bincount((hashes(groups) % np.uint64(_BUCKETS)).astype(np.int64), minlength=_BUCKETS)


def _joined(pieces: list[tuple[np.ndarray, Tensor, Tensor]]) -> tuple[np.ndarray, Tensor, Tensor]:
    groups, logits, labels = zip(*pieces, strict=True)
    return np.concatenate(groups), torch.cat(logits), torch.cat(labels)


def _kept(piece: tuple[np.ndarray, Tensor, Tensor], halvings: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return the rows of ``piece`` whose group is sampled at the rate 2**-halvings."""
    if not halvings:
        return piece
    groups, logits, labels = piece
    rows = np.flatnonzero(hashes(groups) >> np.uint64(64 - halvings) == 0)
    index = torch.from_numpy(rows).to(logits.device, non_blocking=True)
    return groups[rows], logits.index_select(0, index), labels.index_select(0, index)


def hashes(groups: np.ndarray) -> np.ndarray:
    """Return ``(N,)`` uint64 hashes of int64 group ids: the finaliser of SplitMix64, a bijection.

    Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    z = groups.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
