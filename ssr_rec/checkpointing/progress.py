"""Records what a training has done so far, as it stands in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fitted:
    """Records what fit() did.

    Attributes:
        seconds: spent training, without evaluations and saving.
        data_wait: share of those seconds spent waiting for the reader.
        best: the validation row that won: its step, epoch and tasks.
        evaluated_at: step of the last evaluation.
        skipped: steps left out for their loss.
        steps_before: those of earlier runs whose optimizer state this one began with.
        days: the validation rows of a training by days.
    """

    steps: int = 0
    epochs: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    bad_evaluations: int = 0
    stopped_early: bool = False
    evaluated_at: int = 0
    skipped: int = 0
    steps_before: int = 0
    days: list[dict[str, Any]] = field(default_factory=list)

    def count(self, samples: int, seconds: float, wait_seconds: float) -> None:
        """Add what a window of steps took."""
        self.samples += samples
        self.seconds += seconds
        self.wait_seconds += wait_seconds

    def forget_best(self) -> None:
        """Look for the best anew, its weights being lost: what was evaluated at this step is evaluated again."""
        self.best, self.bad_evaluations, self.evaluated_at = {}, 0, -1
        self.days = [row for row in self.days if row["step"] < self.steps]

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0


Tasks = dict[str, dict[str, float]]
