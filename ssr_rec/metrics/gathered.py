"""Brings the predictions of a fold to rank 0, equal rows tied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssr_rec.metrics.exact import gather_rows, with_equal_rows_tied


class Gathered:
    """Keeps every prediction of a fold until rank 0 gets them all: the part that exact measures share."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor | None, ...]] = []

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Take in a batch; see ``FoldMetrics``."""
        self._batches.append((logits.float(), labels, groups, rows, weights))

    def gather(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None] | None:
        """Return logits, equal for equal rows, labels, groups and weights on rank 0, None elsewhere. Collective."""
        logits, labels, groups, keys, weights = (
            None if parts[0] is None else gather_rows(torch.cat(parts)) for parts in zip(*self._batches, strict=True)
        )
        if logits is None or labels is None:
            return None
        return logits if keys is None else with_equal_rows_tied(logits, keys), labels, groups, weights
