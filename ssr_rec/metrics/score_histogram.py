"""Computes the AUC of any number of scores from a histogram of fixed size, with the most it can be wrong by.

Bins follow the order of float32, so every pair of rows in different bins is counted as it is. Pairs within a bin count
half, as ties do; each can be wrong by at most a half. Hence, with ``p_b`` positives and ``n_b`` negatives in bin ``b``
and ``P``, ``N`` in all,

    |AUC of the histogram - AUC| <= sum_b p_b * n_b / (2 * P * N),

whatever the scores. Histograms of parts of a fold add up to that of the fold, in any order, to the last bit.

Bins: 2**-16 wide between -16 and 16, where logits lie; beyond, the upper half of the float32's bits, which makes them
1/128 of the score wide; infinities have bins of their own.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CENTRE = 16.0
"""Bins of equal width lie in [-CENTRE, CENTRE)."""
BINS_PER_UNIT = 2**16
_CENTRE_BINS = int(2 * CENTRE) * BINS_PER_UNIT
_FIRST_TAIL = 0x4180
"""Upper half of the bits of CENTRE."""
_TAIL_BINS = 0x7F80 - _FIRST_TAIL + 1
"""Up to infinity's."""
NUM_BINS = _CENTRE_BINS + 2 * _TAIL_BINS
_LIMB_BITS = 20
_ROUNDING = sys.float_info.epsilon
"""More than two AUCs are rounded by when they are written as float64."""


class BoundedAUC(NamedTuple):
    value: float
    bound: float
    """The exact AUC is no further from ``value``; both are nan when a class is missing."""


def bins_of(scores: Tensor) -> Tensor:
    """Return the bin of each score, int64 in [0, ``NUM_BINS``), of the same shape: never falling as the score rises.

    Args:
        scores: float32, infinities included. A nan gets some bin.
    """
    if scores.device.type == "cpu" and bool((scores.abs() < CENTRE).all()):
        # Nearly always, and a third of the work. To ask a GPU would be to wait for it.
        return _centre_bins(scores)
    scores = torch.where(scores.isnan(), 0.0, scores)
    tail = ((scores.view(torch.int32) & 0x7FFFFFFF) >> 16) - _FIRST_TAIL
    above, below = _TAIL_BINS + _CENTRE_BINS + tail, _TAIL_BINS - 1 - tail
    centre = _centre_bins(scores.clamp(-CENTRE, CENTRE))
    return torch.where(scores >= CENTRE, above, torch.where(scores < -CENTRE, below, centre))


def _centre_bins(scores: Tensor) -> Tensor:
    # Exact: a product with a power of two of numbers this small.
    return (scores * BINS_PER_UNIT).floor().to(torch.int64) + (_CENTRE_BINS // 2 + _TAIL_BINS)


def middles_of_bins(bins: np.ndarray) -> np.ndarray:
    """Return the score in the middle of each bin, that of the tails where they begin: no probability is 2e-6 off."""
    middles = (bins - (_CENTRE_BINS // 2 + _TAIL_BINS) + 0.5) / BINS_PER_UNIT
    return np.clip(middles, -CENTRE, CENTRE)


def auc_of_histogram(positives: np.ndarray, negatives: np.ndarray) -> BoundedAUC:
    """Return AUC from the counts ``(NUM_BINS,)``, or of any other bins in rising order, and its bound.

    Counts that are whole and below 2**60 are multiplied in integers of any size, sums of other weights in float64.
    """
    used = (positives > 0) | (negatives > 0)
    p, n = positives[used], negatives[used]
    if not all((part == np.floor(part)).all() and part.sum() < 2**60 for part in (p, n)):
        return _auc_of_weights(p.astype(np.float64), n.astype(np.float64))
    p, n = p.astype(np.int64), n.astype(np.int64)
    pairs = int(p.sum()) * int(n.sum())
    if not pairs:
        return BoundedAUC(math.nan, math.nan)
    below = np.cumsum(n) - n
    tied = _dot(p, n)
    # Integers are divided with one rounding, however large.
    return BoundedAUC((2 * _dot(p, below) + tied) / (2 * pairs), tied / (2 * pairs) + _ROUNDING)


def _auc_of_weights(p: np.ndarray, n: np.ndarray) -> BoundedAUC:
    """Return ``auc_of_histogram`` of bins ``(b,)`` that hold weights, its bound widened by what float64 rounds."""
    pairs = float(p.sum()) * float(n.sum())
    if not pairs > 0:
        return BoundedAUC(math.nan, math.nan)
    below = np.cumsum(n) - n
    tied = float(p @ n)
    return BoundedAUC((2 * float(p @ below) + tied) / (2 * pairs), tied / (2 * pairs) + 4 * len(p) * _ROUNDING)


def _dot(a: np.ndarray, b: np.ndarray) -> int:
    """Return the exact dot product of up to 2**22 integers each in [0, 2**60)."""
    limbs = range(0, 3 * _LIMB_BITS, _LIMB_BITS)
    mask = (1 << _LIMB_BITS) - 1
    return sum(int(((a >> i) & mask) @ ((b >> j) & mask)) << (i + j) for i in limbs for j in limbs)
