"""Defines the contract of every loss of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor, nn

from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.metrics.links import SIGMOID, Link

Kind = Literal["binary", "number"]


class TaskLoss(nn.Module, ABC):
    """Computes the loss of each row of one task: ``forward(logits (B,), labels (B,)) -> (B,)``.

    A row's loss is that of the row alone. Rows that do not count have the label 0, and their losses are left out by
    whoever averages. The parameters that a loss has are trained, averaged and kept in checkpoints as those of the
    over-arch.

    Attributes:
        settings_class: the pydantic model of its settings; of a class of one's own, which a config names by its path.
        kinds: the kinds of labels it is for.
        is_squared: whether it is a squared error, of which uncertainty weighting takes the half.
        within_groups: whether ``forward`` is called with ``(logits, labels, weights, groups)`` instead, for a loss that
            compares rows of a group: ``weights`` (B,) float32, or None of a dataset without, and ``groups`` (B,) int64,
            ``Batch.runs``, which a dataset has that was prepared with ``together``; it refuses others.

    Args:
        settings: of ``settings_class``.
        number: what is known of the label; None of a binary one.
    """

    settings_class: ClassVar[type[BaseModel]]
    kinds: ClassVar[tuple[Kind, ...]] = ("binary",)
    is_squared: ClassVar[bool] = False
    within_groups: ClassVar[bool] = False

    def __init__(self, settings: Any, number: NumberLabel | None = None) -> None:
        super().__init__()
        self.settings, self.number = settings, number

    @abstractmethod
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss (B,) of each row."""

    def link(self) -> Link:
        """Return how a logit becomes a prediction now; of a binary label it must be ``SIGMOID``."""
        return SIGMOID
