"""Computes the measures of a fold as its batches come: exact from every prediction, or in memory that does not grow.

Both take batches with ``update`` and give the figures with ``compute``, over all ranks.

Bounded: AUC from a histogram (``score_histogram``, error bound reported), GAUC from as many groups as fit
(``group_sample``, interval reported), logloss, NE and calibration from sums in float64, as exact as the exact ones.
Everything but GAUC's rows lies in one tensor on the device, is added to without waiting for the device, and is summed
over ranks at once. Counts are whole numbers in float64, exact up to 2**53; where rows have weights, sums of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.metrics.exact import evaluate_predictions, of_task
from ssr_rec.metrics.gathered import Gathered
from ssr_rec.metrics.group_sample import GroupSample, sampled_gauc
from ssr_rec.metrics.links import Links
from ssr_rec.metrics.number_metrics import BoundedNumbers, ExactNumbers, Joined, Mode, OwnMetric, OwnMetrics, Tasks
from ssr_rec.metrics.reliability import deciles, deciles_of_scores, sigmoid
from ssr_rec.metrics.score_histogram import NUM_BINS, auc_of_histogram, bins_of, middles_of_bins


class FoldMetrics(Protocol):
    mode: Mode

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Take in a batch of this rank: ``logits (B, T)`` float32, ``labels (B, T)``, ``groups (B,)`` on the CPU.

        Args:
            rows: ``(B,)`` int64, equal for equal inputs (``row_keys``); None: equal rows tie where their logits do.
            weights: ``(B, T)`` float32 of each row for each task, in every batch; None: all rows count the same.
        """

    def compute(self) -> Tasks | None:
        """Return label -> measure -> value on rank 0, None elsewhere. Collective; after an update on every rank.

        Raises:
            UserError: a label is neither 0 nor 1.
        """

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        """Return label -> calibration by decile (``reliability.deciles``), on rank 0 and after ``compute``."""


@dataclass(frozen=True)
class Further:
    """Says what is measured beside the measures of binary labels.

    Attributes:
        links: of the tasks whose labels are numbers, which have measures of their own instead.
        functions: measure of one's own -> what computes it, of all tasks.
    """

    links: Links = field(default_factory=dict)
    functions: Mapping[str, OwnMetric] = field(default_factory=dict)


def is_exact(mode: str, max_rows: int, fold_rows: int) -> bool:
    """Return whether ``train.metrics`` and ``train.metrics_rows`` ask for all predictions of a fold."""
    return mode == "exact" or (mode == "auto" and fold_rows <= max_rows)


def fold_metrics(
    mode: str, max_rows: int, fold_rows: int, label_names: Sequence[str], further: Further | None = None
) -> FoldMetrics:
    """Return what ``train.metrics`` and ``train.metrics_rows`` ask for on a fold of ``fold_rows`` rows."""
    further, exact = further or Further(), is_exact(mode, max_rows, fold_rows)
    binary = [name for name in label_names if name not in further.links]
    numbers = {name: further.links[name] for name in label_names if name in further.links}
    parts: list[tuple[Sequence[str], FoldMetrics]] = []
    if binary:
        parts.append((binary, ExactMetrics(binary) if exact else BoundedMetrics(binary, max_rows)))
    if numbers:
        measured: FoldMetrics = ExactNumbers(numbers) if exact else BoundedNumbers(numbers)
        parts.append((list(numbers), measured))
    if further.functions and exact:
        parts.append((label_names, OwnMetrics(label_names, further.links, further.functions)))
    return parts[0][1] if len(parts) == 1 else Joined(label_names, parts)


class ExactMetrics(Gathered):
    """Keeps every prediction; rank 0 gets them all (``metrics``)."""

    mode: Mode = "exact"

    def __init__(self, label_names: Sequence[str]) -> None:
        super().__init__()
        self.label_names = label_names
        self._ranked: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None

    def compute(self) -> Tasks | None:
        if (found := self.gather()) is None:
            return None
        ranked, labels, groups, weights = found
        self._ranked = ranked, labels, weights
        return evaluate_predictions(ranked, labels, groups, self.label_names, weights)

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        assert self._ranked is not None
        logits, labels, weights = self._ranked
        return {
            name: deciles(logits[:, task], labels[:, task], weights=of_task(weights, task))
            for task, name in enumerate(self.label_names)
        }


class BoundedMetrics:
    """Keeps a histogram and three sums per task, and at most ``max_rows`` rows over all ranks for GAUC.

    Per task 34 MB on each rank; for GAUC 8 bytes a kept row and 5 for each of its tasks.
    """

    mode: Mode = "bounded"

    def __init__(self, label_names: Sequence[str], max_rows: int) -> None:
        self.label_names = label_names
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.sample = GroupSample(max(1, max_rows // ranks))
        self._sums: Tensor | None = None
        self._has_groups = False

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        tasks, logits = len(self.label_names), logits.detach().float()
        if self._sums is None:
            self._sums = torch.zeros(tasks * (2 * NUM_BINS + 3), dtype=torch.float64, device=logits.device)
        counts, sums = self._sums[: tasks * 2 * NUM_BINS], self._sums[tasks * 2 * NUM_BINS :].view(3, tasks)
        class_of = 2 * torch.arange(tasks, device=logits.device) + (labels > 0)
        where = (class_of * NUM_BINS + bins_of(logits)).flatten()
        w = torch.ones_like(logits, dtype=torch.float64) if weights is None else weights.double()
        counts.scatter_add_(0, where, w.flatten())
        x, y = logits.double(), labels.double()
        # log(1 + exp(-|x|)) never overflows and keeps small losses: what is left of the cross-entropy is linear.
        losses = (-x.abs()).exp().log1p() + torch.where(labels > 0, -x, x).clamp(min=0)
        averaged = torch.stack([losses, x.sigmoid()])
        if weights is not None:  # also a nan does not count with a row that does not
            averaged = torch.where(w > 0, averaged, 0.0) * w
        sums += torch.cat([averaged.sum(1), (y * (1 - y)).abs().sum(0, keepdim=True)])
        if groups is not None:
            self._has_groups = True
            self.sample.update(logits, labels, groups, weights)

    def compute(self) -> Tasks | None:
        assert self._sums is not None
        if dist.is_initialized():
            dist.reduce(self._sums, 0)
        rows = self.sample.gather() if self._has_groups else None
        if dist.is_initialized() and dist.get_rank():
            return None
        tasks, values = len(self.label_names), self._sums.cpu().numpy()
        counts, sums = values[: tasks * 2 * NUM_BINS].reshape(tasks, 2, NUM_BINS), values[tasks * 2 * NUM_BINS :]
        measures: Tasks = {}
        for task, name in enumerate(self.label_names):
            loss, predicted, wrong = (float(value) for value in sums.reshape(3, tasks)[:, task])
            if wrong:
                raise UserError(f"label {name!r} holds values that are neither 0 nor 1; prepare the log again")
            negatives, positives = (float(count.sum()) for count in counts[task])
            area = auc_of_histogram(counts[task, 1], counts[task, 0])
            is_nan = math.isnan(loss)  # then so is a score, and no order of the rows is right
            measures[name] = {
                "auc": math.nan if is_nan else area.value,
                "auc_bound": math.nan if is_nan else area.bound,
                **_averages(loss, predicted, positives, negatives),
            }
            if rows is not None:
                logits, labels, groups, *weights = rows
                found = sampled_gauc(
                    *(logits[:, task], labels[:, task], groups),
                    self.sample.share,
                    *self.sample.rest(task),
                    weights[0][:, task] if weights else None,
                )
                measures[name] |= {
                    "gauc": math.nan if is_nan else found.value,
                    "gauc_bound": math.nan if is_nan else found.bound,
                    "gauc_share": self.sample.share,
                    "gauc_groups": found.groups,
                    "gauc_rows": found.rows,
                }
        return measures

    def deciles(self) -> dict[str, list[dict[str, Any]]]:
        assert self._sums is not None
        tasks, found = len(self.label_names), {}
        counts = self._sums[: tasks * 2 * NUM_BINS].cpu().numpy().reshape(tasks, 2, NUM_BINS)
        for name, (negatives, positives) in zip(self.label_names, counts, strict=True):
            used = np.flatnonzero(negatives + positives)
            rows = (negatives + positives)[used]
            found[name] = deciles_of_scores(sigmoid(middles_of_bins(used)), rows, positives[used])
        return found


def _averages(loss: float, predicted: float, positives: float, negatives: float) -> dict[str, float]:
    """Return logloss, NE and calibration from sums over the rows, as ``metrics`` defines them."""
    rows = positives + negatives
    mean = loss / rows if rows else math.nan
    rate = positives / rows if rows else 0.0
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)) if 0.0 < rate < 1.0 else math.nan
    return {"logloss": mean, "ne": mean / entropy, "calibration": predicted / positives if positives else math.nan}
