"""Computes what a reliability diagram and a precision-recall curve are drawn from.

Shapes: ``N`` rows of a split, ``n`` distinct scores. Scores are logits; labels are 0 or 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

BINS = 10
"""Parts of equal numbers of rows: deciles."""


def deciles(
    logits: np.ndarray, labels: np.ndarray, bins: int = BINS, weights: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return, of each tenth of the rows by rising score, its ``rows`` and mean ``predicted`` and ``observed`` value.

    Rows of one score stay together, in the part where their middle lies; so parts may be unequal, and empty ones are
    left out. Without rows, or with a nan among the scores, there are none.

    Args:
        logits: ``(N,)``.
        labels: ``(N,)``.
        bins: how many parts instead of ten.
        weights: ``(N,)`` by which rows count, 0 or more; None: all the same.
    """
    if weights is not None:
        logits, labels, weights = logits[weights > 0], labels[weights > 0], weights[weights > 0]
    if not len(logits) or np.isnan(logits).any():
        return []
    scores, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    hits = np.asarray(labels) == 1
    if weights is not None:
        counts, hits = np.bincount(place, weights=weights, minlength=len(scores)), hits * weights
    positives = np.bincount(place, weights=hits, minlength=len(scores))
    return deciles_of_scores(sigmoid(scores), counts, positives, bins)


def deciles_of_scores(
    predicted: np.ndarray, counts: np.ndarray, positives: np.ndarray, bins: int = BINS
) -> list[dict[str, Any]]:
    """Return ``deciles`` of rows that are counted by score.

    Args:
        predicted: ``(n,)`` probabilities in rising order.
        counts: ``(n,)`` rows of each, or the sums of their weights.
        positives: ``(n,)`` of the positive ones among them.
        bins: how many parts.
    """
    middles = np.cumsum(counts) - counts / 2
    part = np.minimum((middles / counts.sum() * bins).astype(np.int64), bins - 1)
    rows, hits, sums = (
        np.bincount(part, weights=weights, minlength=bins) for weights in (counts, positives, predicted * counts)
    )
    return [
        {"rows": whole(rows[i]), "predicted": float(sums[i] / rows[i]), "observed": float(hits[i] / rows[i])}
        for i in np.flatnonzero(rows).tolist()
    ]


def whole(count: float) -> float:
    """Return a number of rows as an int, and a sum of weights as it is where it is not whole."""
    return int(count) if count == int(count) else float(count)


class PrecisionRecall(NamedTuple):
    precision: np.ndarray
    """``(P,)`` of the rows above a score, from the highest score on."""
    recall: np.ndarray
    """``(P,)``, rising to 1."""
    average_precision: float
    """Sum over distinct scores of the gain in recall times the precision there; nan without a positive row."""


def precision_recall(
    logits: np.ndarray, labels: np.ndarray, most_points: int = 500, weights: np.ndarray | None = None
) -> PrecisionRecall:
    """Return the precision-recall curve, thinned to about ``most_points``, and its average precision before that.

    Args:
        logits: ``(N,)``.
        labels: ``(N,)``.
        most_points: of the curve.
        weights: ``(N,)`` as in ``deciles``.
    """
    weights = np.ones(len(logits)) if weights is None else np.asarray(weights, dtype=np.float64)
    logits, labels, weights = logits[weights > 0], labels[weights > 0], weights[weights > 0]
    positive = np.asarray(labels) == 1
    if not positive.any() or np.isnan(logits).any():
        return PrecisionRecall(np.empty(0), np.empty(0), math.nan)
    order = np.argsort(-np.asarray(logits), kind="stable")
    scores, positive, weights = np.asarray(logits)[order], positive[order], weights[order]
    last_of_tie = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    hits = np.cumsum(positive * weights)[last_of_tie]
    precision, recall = hits / np.cumsum(weights)[last_of_tie], hits / hits[-1]
    average = float((np.diff(recall, prepend=0.0) * precision).sum())
    # Even in recall, where the curve is drawn; every score of the first few rows would be most of the points.
    wanted = np.unique(np.searchsorted(recall, np.linspace(recall[0], 1.0, most_points)))
    return PrecisionRecall(precision[wanted], recall[wanted], average)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return probabilities in float64, without overflow at either end."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64)))
