"""Computes ``ranking_measures`` of a fold as its batches come, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.metrics.exact import of_task
from ssr_rec.metrics.gathered import Gathered
from ssr_rec.metrics.group_sample import GroupSample
from ssr_rec.metrics.ranking import ranking_measures

SHARE = "ranking_share"
"""At what rate groups were sampled, where that is below 1."""


class RankingMetrics:
    """Keeps the predictions of a fold, or of as many whole groups as fit, and ranks them.

    Args:
        names: measures, see ``ranking_measures``.
        columns: task -> its column of the logits.
        max_rows: rows over all ranks to keep, of groups that are sampled as for GAUC; None: all.
    """

    def __init__(self, names: Sequence[str], columns: dict[str, int], max_rows: int | None) -> None:
        self.names, self.columns = names, columns
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.sample = None if max_rows is None else GroupSample(max(1, max_rows // ranks))
        self._all = Gathered()

    def update(
        self, logits: Tensor, labels: Tensor, groups: Tensor, rows: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Take in a batch of this rank: ``logits (B, T)``, ``labels (B, T)``, ``groups (B,)`` on the CPU.

        Args:
            rows: as for ``FoldMetrics.update``.
            weights: as for ``FoldMetrics.update``.
        """
        chosen = list(self.columns.values())
        logits, labels = logits[:, chosen].float(), labels[:, chosen].to(torch.uint8)
        weights = None if weights is None else weights[:, chosen]
        if self.sample is not None:
            self.sample.update(logits, labels, groups, weights)
        else:
            self._all.update(logits, labels, groups, rows, weights)

    def compute(self) -> dict[str, dict[str, float]] | None:
        """Return task -> measure -> value on rank 0, None elsewhere. Collective; after an update on every rank."""
        if (gathered := self._gathered()) is None:
            return None
        logits, labels, groups, weights = gathered
        found = {}
        for column, name in enumerate(self.columns):
            of_column = of_task(weights, column)
            found[name] = ranking_measures(logits[:, column], labels[:, column], groups, self.names, of_column)
            if self.sample is not None and self.sample.halvings:
                found[name][SHARE] = self.sample.share
        return found

    def _gathered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None] | None:
        """Return logits, labels, groups and any weights of all ranks on rank 0."""
        if self.sample is not None:
            sampled = self.sample.gather()
            if sampled is None:
                return None
            return sampled[0], sampled[1], sampled[2], sampled[3] if len(sampled) > 3 else None
        if (gathered := self._all.gather()) is None:
            return None
        logits, labels, groups, weights = gathered
        assert groups is not None
        return logits, labels, groups, weights
