"""Computes the AUC over the last training rows, for progress rows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence

import torch

from ssr_rec.common.errors import UserError
from ssr_rec.metrics.exact import auc


class RunningAUC:
    """Computes AUC over the last ``window`` training rows of this rank, for the progress line.

    ``update`` only keeps a copy of the batch where it is and never waits for the device; sorting and the transfer
    happen in ``compute``, when a line is printed.

    Args:
        label_names: the tasks, in the order of the columns.
        window: in rows.
        numbers: those of them whose labels are numbers, which have no AUC.
    """

    def __init__(self, label_names: Sequence[str], window: int = 65_536, numbers: Collection[str] = ()) -> None:
        if window < 1:
            raise UserError(f"window is {window}; keep at least one row")
        self.label_names = list(label_names)
        self.window, self.numbers = window, numbers
        self._batches: deque[tuple[torch.Tensor, ...]] = deque()
        self._rows = 0

    def update(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in a batch: ``logits (B, T)``, ``labels (B, T)`` and ``weights (B, T)``, or None in every batch."""
        # Cloned: the caller may reuse its buffers, and a view would keep the whole batch alive.
        parts = (logits, labels) if weights is None else (logits, labels, weights)
        self._batches.append(tuple(part[-self.window :].detach().clone() for part in parts))
        self._rows += len(self._batches[-1][0])
        while self._rows - len(self._batches[0][0]) >= self.window:
            self._rows -= len(self._batches.popleft()[0])

    def rows(self) -> tuple[torch.Tensor, ...] | None:
        """Return the window: ``logits (n, T)``, ``labels (n, T)`` and any weights; None before the first batch."""
        if not self._batches:
            return None
        return tuple(torch.cat(part)[-self.window :] for part in zip(*self._batches, strict=True))

    def compute(self) -> dict[str, float]:
        """Return label -> AUC of the window; nan before both classes were seen."""
        if (rows := self.rows()) is None:
            return {name: math.nan for name in self.label_names if name not in self.numbers}
        logits, labels, *weights = (part.float().cpu().numpy() for part in rows)
        of_tasks = [(task, name) for task, name in enumerate(self.label_names) if name not in self.numbers]
        return {name: auc(*(part[:, task] for part in (logits, labels, *weights))) for task, name in of_tasks}
