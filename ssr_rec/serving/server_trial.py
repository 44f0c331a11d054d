"""Tries a new model on a share of the requests, beside the one that answers them, before it takes over."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future

import numpy as np

from ssr_rec.serving.server_batcher import Batcher, Busy, Closed, Probabilities, TooLate, Waiting
from ssr_rec.serving.server_requests import Request

PATIENCE_S = 60.0
"""A request that the new model has not scored by then is left out."""


class Trial:
    """Compares a new model's probabilities with those that were answered.

    Args:
        batcher: of the new model.
        labels: the tasks that both models must have.
        share: of the requests.
        rows: to compare before there is a verdict.
        most: the mean difference of a task's probabilities up to which the verdict is good.
        units: of labels that are numbers, the standard deviations by which differences of predictions are divided.
    """

    def __init__(
        self,
        batcher: Batcher,
        labels: Sequence[str],
        share: float,
        rows: int,
        most: float,
        units: Mapping[str, float] | None = None,
    ) -> None:
        units = units or {}
        self._units = np.array([units.get(label, 1.0) for label in labels])
        self.batcher, self.labels = batcher, list(labels)
        self.share, self.rows_wanted, self.most = share, rows, most
        self.rows, self.failed = 0, ""
        self._sums = np.zeros(len(self.labels))
        self._lock = threading.Lock()

    def take(self, request: Request, answered: Probabilities) -> None:
        """Let the new model score a request too, by chance; nobody waits for it."""
        if random.random() >= self.share:
            return
        waiting = Waiting(request.encode, request.rows, time.monotonic() + PATIENCE_S)
        waiting.answer.add_done_callback(lambda found: self._compare(found, answered))
        try:
            self.batcher.submit(waiting)
        except (Busy, Closed):
            return

    def _compare(self, found: Future[Probabilities], answered: Probabilities) -> None:
        try:
            mine = found.result()
        except (CancelledError, TooLate):
            return
        except Exception as error:  # the model that answers could read and score these rows
            self.failed = type(error).__name__
            return
        if mine.keys() != answered.keys():
            self.failed = f"tasks {', '.join(mine)} instead of {', '.join(answered)}"
            return
        differences = [np.abs(mine[label].astype(np.float64) - answered[label]).sum() for label in self.labels]
        with self._lock:
            self.rows += len(answered[self.labels[0]])
            self._sums += np.array(differences) / self._units

    def differences(self) -> dict[str, float]:
        """Return the mean difference of each task's probabilities so far."""
        with self._lock:
            return dict(zip(self.labels, (self._sums / max(1, self.rows)).tolist(), strict=True))

    def problem(self) -> str | None:
        """Return what is wrong with the new model, "" if nothing is, None while there are too few rows."""
        if self.failed:
            return f"it failed on a request that was answered: {self.failed}"
        if self.rows < self.rows_wanted:
            return None
        label, worst = max(self.differences().items(), key=lambda one: (one[1] != one[1], one[1]))
        return "" if worst <= self.most else f"{label} differs by {worst:.3g} on average over {self.rows:,} rows"
