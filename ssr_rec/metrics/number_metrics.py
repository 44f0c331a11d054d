"""Measures tasks whose labels are numbers as the batches of a fold come, and joins measures of several kinds of tasks.

Bounded, RMSE, MAE and calibration are of sums in float64, as exact as the exact ones; XAUC, which needs all rows, is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.metrics.exact import evaluate_predictions, of_task
from ssr_rec.metrics.gathered import Gathered
from ssr_rec.metrics.links import SIGMOID, Links
from ssr_rec.metrics.numbers import calibration_of_numbers, mae, rmse, xauc
from ssr_rec.metrics.reliability import deciles_of_scores

Mode = Literal["exact", "bounded"]
Tasks = dict[str, dict[str, float]]
OwnMetric = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], float]
"""A measure of one's own: scores, labels and weights (N,) float64, and groups (N,) int64 or None, to a number."""


def evaluate_numbers(logits: np.ndarray, labels: np.ndarray, links: Links, weights: np.ndarray | None = None) -> Tasks:
    """Return ``rmse``, ``mae``, ``xauc`` and ``calibration`` of each task of ``links``.

    Args:
        logits: ``(N, T)`` of these tasks, in their order.
        labels: ``(N, T)``.
        links: task -> its link.
        weights: ``(N, T)`` or None.
    """
    found = {}
    for place, (name, link) in enumerate(links.items()):
        x, y, w = logits[:, place], labels[:, place], of_task(weights, place)
        predicted = link.predict(x)
        found[name] = {
            "rmse": rmse(predicted, y, w),
            "mae": mae(predicted, y, w),
            "xauc": xauc(x, y, w),
            "calibration": calibration_of_numbers(predicted, y, w),
        }
    return found


def evaluate_tasks(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    names: Sequence[str],
    links: Links,
    weights: np.ndarray | None = None,
) -> Tasks:
    """Return every measure of every task: of ``evaluate_predictions``, or of those in ``links`` ``evaluate_numbers``.

    Args:
        logits: ``(N, T)``.
        labels: ``(N, T)``.
        groups: ``(N,)`` or None.
        names: the ``T`` tasks.
        links: of those whose labels are numbers.
        weights: ``(N, T)`` or None.
    """
    if not links:
        return evaluate_predictions(logits, labels, groups, names, weights)
    found: Tasks = {}
    for place, name in enumerate(names):
        x, y = logits[:, [place]], labels[:, [place]]
        w = None if weights is None else weights[:, [place]]
        if name in links:
            found |= evaluate_numbers(x, y, {name: links[name]}, w)
        else:
            found |= evaluate_predictions(x, y, groups, [name], w)
    return found


class ExactNumbers(Gathered):
    """Measures numbers from every prediction; see ``FoldMetrics``."""

    mode: Mode = "exact"

    def __init__(self, links: Links) -> None:
        super().__init__()
        self.links = links
        self._found: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None

    def compute(self) -> Tasks | None:
        if (found := self.gather()) is None:
            return None
        logits, labels, _, weights = found
        self._found = logits, labels, weights
        return evaluate_numbers(logits, labels, self.links, weights)

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        assert self._found is not None
        logits, labels, weights = self._found
        return {
            name: deciles_of_numbers(link.predict(logits[:, place]), labels[:, place], of_task(weights, place))
            for place, (name, link) in enumerate(self.links.items())
        }


def deciles_of_numbers(
    predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return of each tenth of the rows by rising prediction what ``reliability.deciles`` does; arrays are ``(N,)``."""
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    predicted, labels, weights = predicted[weights > 0], labels[weights > 0], weights[weights > 0]
    if not len(labels) or np.isnan(predicted).any():
        return []
    values, place = np.unique(predicted, return_inverse=True)
    rows, sums = (np.bincount(place, weights=each, minlength=len(values)) for each in (weights, labels * weights))
    return deciles_of_scores(values, rows, sums)


class BoundedNumbers:
    """Measures numbers from six sums a task; see ``FoldMetrics``."""

    mode: Mode = "bounded"

    def __init__(self, links: Links) -> None:
        self.links = links
        self._sums = np.zeros((6, len(links)))

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        x, y = logits.detach().float().cpu().numpy(), labels.cpu().numpy().astype(np.float64)
        w = np.ones_like(y) if weights is None else weights.cpu().numpy().astype(np.float64)
        for place, link in enumerate(self.links.values()):
            counts = w[:, place] > 0
            of_rows, label = w[counts, place], y[counts, place]
            predicted = link.predict(x[counts, place])
            error = predicted - label
            parts = (np.ones_like(label), np.square(error), np.abs(error), predicted, label)
            self._sums[:, place] += [*((part * of_rows).sum() for part in parts), (label < 0).sum()]

    def compute(self) -> Tasks | None:
        sums = torch.from_numpy(self._sums.copy())
        if dist.is_initialized():
            dist.all_reduce(sums)
            if dist.get_rank():
                return None
        found = {}
        for name, (rows, squares, absolute, predicted, labels, negative) in zip(
            self.links, sums.T.tolist(), strict=True
        ):
            found[name] = {
                "rmse": math.sqrt(squares / rows) if rows else math.nan,
                "mae": absolute / rows if rows else math.nan,
                "calibration": predicted / labels if labels and not negative else math.nan,
            }
        return found

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        """Return nothing: sums do not tell."""
        return {}


class OwnMetrics(Gathered):
    """Computes measures of one's own from every row; see ``FoldMetrics``.

    Args:
        names: the tasks, in the order of the columns.
        links: of those whose labels are numbers.
        functions: measure -> what computes it.
    """

    mode: Mode = "exact"

    def __init__(self, names: Sequence[str], links: Links, functions: Mapping[str, OwnMetric]) -> None:
        super().__init__()
        self.names, self.links, self.functions = names, links, functions

    def compute(self) -> Tasks | None:
        if (found := self.gather()) is None:
            return None
        logits, labels, groups, weights = found
        tasks: Tasks = {}
        for place, name in enumerate(self.names):
            w = np.ones(len(labels)) if weights is None else weights[:, place].astype(np.float64)
            rows = w > 0
            scores = self.links.get(name, SIGMOID).predict(logits[rows, place])
            given = (scores, labels[rows, place].astype(np.float64), w[rows], None if groups is None else groups[rows])
            tasks[name] = {measure: measured(measure, function, given) for measure, function in self.functions.items()}
        return tasks

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        """Return nothing: other measures have them."""
        return {}


def measured(name: str, function: OwnMetric, given: tuple[Any, ...]) -> float:
    """Return what a function of the user's own measures; nan without rows.

    Raises:
        UserError: it raises something, or returns no number.
    """
    if not len(given[0]):  # of a task that no row of a day counts for
        return math.nan
    try:
        return float(function(*given))
    except Exception as error:  # whatever a function of somebody else's raises
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"train.extra_metrics: {name} of {len(given[0])} rows: {said}") from None


class Joined:
    """Measures tasks by several parts, each of which sees some columns; see ``FoldMetrics``.

    Args:
        names: the tasks, in the order of the columns.
        parts: tasks of each and what measures them; the first says whether it is exact.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[tuple[Sequence[str], Any]]) -> None:
        self.names = names
        self.parts = [([list(names).index(name) for name in of_part], part) for of_part, part in parts]
        self.mode: Mode = self.parts[0][1].mode

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        for places, part in self.parts:
            columns = (None if all_of is None else all_of[:, places] for all_of in (logits, labels, weights))
            x, y, w = columns
            part.update(x, y, groups, rows, w)

    def compute(self) -> Tasks | None:
        found = [part.compute() for _, part in self.parts]
        if found[0] is None:
            return None
        tasks: Tasks = {name: {} for name in self.names}
        for of_part in found:
            for name, measures in of_part.items():
                tasks[name] |= measures
        return tasks

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for _, part in self.parts:
            found |= part.deciles()
        return {name: found[name] for name in self.names if name in found}
