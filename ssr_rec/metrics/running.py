"""Computes the AUC over the last training rows, of numbers the XAUC, for progress rows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence

import torch

from ssr_rec.common.errors import UserError
from ssr_rec.metrics.exact import auc
from ssr_rec.metrics.numbers import xauc


class RunningAUC:
    """Computes AUC, of numbers XAUC, over the last ``window`` training rows of this rank, for the progress line.

    ``update`` only keeps a copy of the batch where it is and never waits for the device; sorting and the transfer
    happen in ``compute``, when a line is printed.

    Args:
        label_names: the tasks, in the order of the columns.
        window: in rows.
        numbers: those of them whose labels are numbers, of which a larger logit predicts a larger one.
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

    def compute(self) -> dict[str, dict[str, float]]:
        """Return label -> ``auc`` or ``xauc`` of the window; nan before two labels that differ were seen."""
        names = {name: "xauc" if name in self.numbers else "auc" for name in self.label_names}
        if (rows := self.rows()) is None:
            return {label: {name: math.nan} for label, name in names.items()}
        logits, labels, *weights = (part.float().cpu().numpy() for part in rows)
        found = {}
        for task, (label, name) in enumerate(names.items()):
            measure = xauc if name == "xauc" else auc
            found[label] = {name: measure(*(part[:, task] for part in (logits, labels, *weights)))}
        return found
