"""Measures a model on the rows of each value of a column, to find the rows on which it is worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssr_rec.explaining.values import Column
from ssr_rec.metrics.by_value import measures_by_value

ORDERS = ("auc", "logloss", "calibration")
"""What "worst" may mean: the lowest AUC, the highest logloss, or the mean prediction furthest off by its ratio."""

RARER = "(rarer values)"


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
    counted = column.codes if weights is None else column.codes[weights > 0]
    counts = np.bincount(counted, minlength=len(column.names))
    rare = counts < min_rows
    codes = np.where(rare[column.codes], len(column.names), column.codes)
    found = measures_by_value(logits, labels, codes, [*column.names, RARER], weights)
    for one in found:
        if one["value"] == RARER:
            one["values"] = int((rare & (counts > 0)).sum())
    return [{"column": column.name, **one} for one in found]


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
