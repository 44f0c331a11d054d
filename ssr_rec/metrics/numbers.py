"""Computes RMSE, MAE, XAUC and calibration of a fold's predictions of a number, such as seconds watched.

Shapes: ``N`` rows of the fold. Rows count by their weights, 0 or more, as in ``exact``; None: all the same.
"""

from __future__ import annotations

import math

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.metrics.exact import MOST_COUNTED


def rmse(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the root of the mean squared error; nan without rows.

    Args:
        predicted: ``(N,)`` in the unit of the labels.
        labels: ``(N,)``.
        weights: ``(N,)``.

    Raises:
        UserError: shapes differ, a label is not finite, or a weight is negative or not finite.
    """
    predicted, labels, weights = _checked(predicted, labels, weights)
    return math.sqrt(_mean(np.square(predicted - labels), weights))


def mae(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean absolute error; nan without rows. Arguments and errors as in ``rmse``."""
    predicted, labels, weights = _checked(predicted, labels, weights)
    return _mean(np.abs(predicted - labels), weights)


def calibration_of_numbers(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the sum of predictions over the sum of labels; nan where a label is below 0, or all are 0.

    Arguments and errors as in ``rmse``.
    """
    predicted, labels, weights = _checked(predicted, labels, weights)
    if (labels < 0).any() or not labels.any():
        return math.nan
    return math.fsum(predicted * weights) / math.fsum(labels * weights)


def xauc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the share of pairs of rows with different labels whose scores are in the same order, ties counting half.

    Zhan et al., "Deconfounding Duration Bias in Watch-time Prediction for Video Recommendation", KDD 2022. Of binary
    labels it is AUC. All pairs are counted, in O(N log N); with weights a pair counts by the product of its rows'.

    Args:
        scores: ``(N,)`` any increasing function of the prediction.
        labels: ``(N,)``.
        weights: ``(N,)``.

    Returns:
        nan when all labels are equal or a score is nan.

    Raises:
        UserError: as in ``rmse``.
    """
    scores, labels, weights = _checked(scores, labels, weights)
    if not len(scores) or np.isnan(scores).any():
        return math.nan
    if weights.sum() < MOST_COUNTED and (weights == np.floor(weights)).all():
        weights = weights.astype(np.int64)
    _, ranks = np.unique(scores, return_inverse=True)
    _, classes = np.unique(labels, return_inverse=True)
    # Rows of one label fall in score, so that none of their pairs seems to be in order.
    order = np.lexsort((-ranks, classes))
    right = _pairs_in_order(ranks[order], weights[order])
    of_score, of_class = _pairs_within(ranks, weights), _pairs_within(classes, weights)
    of_both = _pairs_within(ranks * (classes.max() + 1) + classes, weights)
    pairs = _pairs_within(np.zeros_like(ranks), weights) - of_class
    return float((2 * right + of_score - of_both) / (2 * pairs)) if pairs > 0 else math.nan


def _pairs_within(groups: np.ndarray, weights: np.ndarray) -> float:
    """Return how many pairs of rows, by the products of their weights, are of one group, of groups (N,) of int64."""
    order = np.argsort(groups, kind="stable")
    groups, weights = groups[order], weights[order]
    starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    sums = np.add.reduceat(weights, starts)
    twice: float = ((sums * sums).sum() - (weights * weights).sum()).item()
    return twice / 2 if isinstance(twice, float) else twice // 2


def _pairs_in_order(ranks: np.ndarray, weights: np.ndarray) -> float:
    """Return how many pairs of rows rise, the one before having the lower of the ranks ``(N,)``.

    Two ranks that differ have a highest bit in which they do. So for each bit, from the highest on, rows whose higher
    bits are equal lie together, in their order, and rows with a 1 count the rows with a 0 before them.
    """
    found: float = 0
    for bit in range(int(ranks.max()).bit_length() - 1, -1, -1):
        above, is_one = ranks >> (bit + 1), (ranks >> bit & 1).astype(bool)
        starts = np.flatnonzero(np.concatenate(([True], above[1:] != above[:-1])))
        lengths = np.diff(starts, append=len(ranks))
        zeros = np.where(is_one, 0, weights)
        before = np.cumsum(zeros)
        before -= np.repeat(before[starts] - zeros[starts], lengths)
        found += (weights[is_one] * before[is_one]).sum().item()
        # The next bit wants the zeros of each part before its ones.
        ones, count = np.cumsum(is_one), np.arange(len(ranks))
        first = np.repeat(starts, lengths)
        ones_before = ones - is_one - np.repeat(ones[starts] - is_one[starts], lengths)
        zeros_in_part = lengths - np.add.reduceat(is_one.astype(np.int64), starts)
        place = np.where(is_one, first + np.repeat(zeros_in_part, lengths) + ones_before, count - ones_before)
        moved, of_moved = np.empty_like(ranks), np.empty_like(weights)
        moved[place], of_moved[place] = ranks, weights
        ranks, weights = moved, of_moved
    return found


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return math.fsum(values * weights) / math.fsum(weights) if len(values) else math.nan


def _checked(
    predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predictions, labels and weights in float64 of the rows that count, known to be rows of a fold."""
    predicted, labels = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise UserError(f"predictions have shape {predicted.shape}, labels {labels.shape}; both must be (N,)")
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != labels.shape:
        raise UserError(f"weights have shape {weights.shape}, labels {labels.shape}; give each row its weight")
    fit = np.isfinite(weights) & (weights >= 0)
    if not fit.all():
        raise UserError(f"weights must be finite and not negative, got {weights[~fit][0]}")
    counts = weights > 0
    predicted, labels, weights = predicted[counts], labels[counts], weights[counts]
    if not np.isfinite(labels).all():
        raise UserError(f"labels must be finite, got {labels[~np.isfinite(labels)][0]}")
    return predicted, labels, weights
