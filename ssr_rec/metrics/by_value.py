"""Computes the measures of a fold for each value of a column, such as a domain, as its batches come, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.metrics.exact import auc_of_groups, of_task
from ssr_rec.metrics.gathered import Gathered
from ssr_rec.metrics.reliability import sigmoid
from ssr_rec.metrics.split_metrics import Mode

ByValue = dict[str, list[dict[str, Any]]]
"""Task -> entries of ``measures_by_value``."""


def measures_by_value(
    logits: np.ndarray,
    labels: np.ndarray,
    codes: np.ndarray,
    names: Sequence[str],
    weights: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return the measures of one task for each value that has rows, in the order of the values.

    Args:
        logits: ``(N,)``.
        labels: ``(N,)``.
        codes: ``(N,)`` of each row's value, into ``names``.
        names: the values.
        weights: ``(N,)`` by which rows count in the measures, 0 where they are not counted at all; None: all the same.

    Returns:
        entries of ``value``, ``rows``, ``positives``, ``auc``, ``auc_se``, ``logloss``, ``calibration``; nan where a
        measure is not defined.
    """
    kept = np.ones(len(labels)) if weights is None else weights.astype(np.float64)
    if weights is not None:
        logits, labels, codes, kept = (part[weights > 0] for part in (logits, labels, codes, kept))
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
        area = float(areas[i]) if len(areas) else math.nan
        found.append(
            {
                "value": names[code],
                "rows": int(rows[i]),
                "positives": int(positives[i]),
                "auc": area,
                "auc_se": auc_error(area, int(positives[i]), int(rows[i])),
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


class MetricsByValue:
    """Takes the batches of a fold and gives the measures of each value.

    Exact: it keeps every prediction. Bounded: it keeps sums of each task and value, which give all but the AUC.
    """

    def __init__(self, mode: Mode, tasks: Sequence[str], names: Sequence[str]) -> None:
        self.mode, self.tasks, self.names = mode, tasks, names
        self._gathered = Gathered()
        self._sums: Tensor | None = None

    def update(self, logits: Tensor, labels: Tensor, codes: Tensor, rows: Tensor, weights: Tensor | None) -> None:
        """Take in a batch of this rank; arguments as in ``FoldMetrics.update``, ``codes (B,)`` into the names."""
        if self.mode == "exact":
            self._gathered.update(logits, labels, codes, rows, weights)
            return
        x, positive = logits.detach().double(), labels > 0
        w = torch.ones_like(x) if weights is None else weights.double()
        losses = (-x.abs()).exp().log1p() + torch.where(positive, -x, x).clamp(min=0)
        parts = [(w > 0).double(), (positive & (w > 0)).double(), w, positive * w]
        parts += [torch.where(w > 0, losses, 0.0) * w, torch.where(w > 0, x.sigmoid(), 0.0) * w]
        added = torch.stack(parts, 1)
        if self._sums is None:
            self._sums = added.new_zeros(len(self.names), *added.shape[1:])
        self._sums.index_add_(0, codes.to(added.device), added)

    def compute(self) -> ByValue | None:
        """Return task -> entries on rank 0, None elsewhere. Collective; after an update on every rank."""
        if self.mode == "exact":
            if (gathered := self._gathered.gather()) is None:
                return None
            tied, labels, codes, weights = gathered
            assert codes is not None
            return {
                task: measures_by_value(tied[:, i], labels[:, i], codes, self.names, of_task(weights, i))
                for i, task in enumerate(self.tasks)
            }
        assert self._sums is not None
        if dist.is_initialized():
            dist.reduce(self._sums, 0)
            if dist.get_rank():
                return None
        sums = self._sums.cpu()
        return {task: self._of_sums(sums[:, :, i]) for i, task in enumerate(self.tasks)}

    def _of_sums(self, sums: Tensor) -> list[dict[str, Any]]:
        found = []
        for name, (rows, positives, weight, hits, loss, predicted) in zip(self.names, sums.tolist(), strict=True):
            if rows:
                found.append(
                    {
                        "value": name,
                        "rows": int(rows),
                        "positives": int(positives),
                        "logloss": loss / weight,
                        "calibration": predicted / hits if hits else math.nan,
                    }
                )
        return found
