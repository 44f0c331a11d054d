"""Measures a model on the rows of each value of a column, to find the rows on which it is worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssr_rec.explaining.values import Column
from ssr_rec.metrics.exact import auc_of_groups
from ssr_rec.metrics.reliability import sigmoid

ORDERS = ("auc", "logloss", "calibration")
"""What "worst" may mean: the lowest AUC, the highest logloss, or the mean prediction furthest off by its ratio."""


def slices(
    logits: np.ndarray, labels: np.ndarray, column: Column, min_rows: int, weights: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return the measures of one task by the values of a column, in the order of the values.

    Values of fewer than ``min_rows`` rows are taken together in one entry, where ``values`` says how many they are.

    Args:
        logits: ``(N,)``.
        labels: ``(N,)``.
        column: of the same rows.
        min_rows: rows that earn a value a line of its own.
        weights: ``(N,)`` by which rows count in the measures, 0 where they are not counted at all; None: all the same.

    Returns:
        entries of ``column``, ``value``, ``rows``, ``positives``, ``auc``, ``auc_se``, ``logloss``, ``calibration``;
        nan where a measure is not defined.
    """
    of_rows, kept = column.codes, np.ones(len(labels)) if weights is None else weights.astype(np.float64)
    if weights is not None:
        logits, labels, of_rows, kept = (part[weights > 0] for part in (logits, labels, of_rows, kept))
    counts = np.bincount(of_rows, minlength=len(column.names))
    rare = counts < min_rows
    codes = np.where(rare[of_rows], len(column.names), of_rows)
    areas, _ = auc_of_groups(logits, labels, codes, None if weights is None else kept)
    present, place = np.unique(codes, return_inverse=True)
    positive = labels == 1
    rows, positives = np.bincount(place), np.bincount(place, weights=positive)
    weight, hits = np.bincount(place, weights=kept), np.bincount(place, weights=positive * kept)
    each = np.logaddexp(0.0, np.where(positive, -logits.astype(np.float64), logits))
    losses = np.bincount(place, weights=each * kept)
    predicted = np.bincount(place, weights=sigmoid(logits) * kept)
    found = []
    for i, code in enumerate(present.tolist()):
        together = code == len(column.names)
        found.append(
            {
                "column": column.name,
                "value": "(rarer values)" if together else column.names[code],
                **({"values": int((rare & (counts > 0)).sum())} if together else {}),
                "rows": int(rows[i]),
                "positives": int(positives[i]),
                "auc": float(areas[i]) if len(areas) else math.nan,
                "auc_se": auc_error(float(areas[i]), int(positives[i]), int(rows[i])) if len(areas) else math.nan,
                "logloss": float(losses[i] / weight[i]),
                "calibration": float(predicted[i] / hits[i]) if hits[i] else math.nan,
            }
        )
    return found


def auc_error(area: float, positives: int, rows: int) -> float:
    """Return the standard error of an AUC, by Hanley and McNeil (Radiology 143, 1982)."""
    negatives = rows - positives
    if math.isnan(area) or not positives or not negatives:
        return math.nan
    both_above, both_below = area / (2 - area), 2 * area**2 / (1 + area)
    spread = (positives - 1) * (both_above - area**2) + (negatives - 1) * (both_below - area**2)
    return math.sqrt(max(0.0, area * (1 - area) + spread) / (positives * negatives))


def worst_first(found: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Return slices with the worst first; those without the measure, and of rarer values together, come last.

    Args:
        found: slices of one task.
        by: one of ``ORDERS``.
    """

    def badness(one: dict[str, Any]) -> float:
        value = one[by]
        if math.isnan(value) or "values" in one:
            return -math.inf
        if by == "calibration":
            return abs(math.log(value)) if value > 0 else math.inf
        return -value if by == "auc" else value

    return sorted(found, key=badness, reverse=True)
