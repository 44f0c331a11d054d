"""Lists the losses that a config can name, and makes those of a run's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import own_class, own_settings
from ssr_rec.config.losses import CrossEntropyConfig, CustomLossConfig, LossSettings, MSEConfig
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.schema import Schema
from ssr_rec.metrics.links import SIGMOID, Link
from ssr_rec.model.losses.base import TaskLoss
from ssr_rec.model.losses.pointwise import MSE, CrossEntropy, Focal, LogNormal
from ssr_rec.model.losses.within_groups import Pairwise, Softmax

LOSSES: dict[str, type[TaskLoss]] = {
    "cross_entropy": CrossEntropy,
    "focal": Focal,
    "softmax": Softmax,
    "pairwise": Pairwise,
    "mse": MSE,
    "log_normal": LogNormal,
}


class TaskLosses(nn.Module):
    """Computes every task's loss of every row: logits, labels (B, T) and any weights to (B, T).

    Args:
        losses: task -> its loss, in the order of the columns.
    """

    def __init__(self, losses: Mapping[str, TaskLoss]) -> None:
        super().__init__()
        self.names = list(losses)
        self.of_tasks = nn.ModuleDict({_key(name): loss for name, loss in losses.items()})

    @property
    def all(self) -> list[TaskLoss]:
        """Return the losses in the order of the columns."""
        return [one for one in self.of_tasks.values() if isinstance(one, TaskLoss)]

    @property
    def is_plain(self) -> bool:
        """Return whether every loss is binary cross-entropy as it is."""
        return all(type(one) is CrossEntropy and not one.settings.label_smoothing for one in self.all)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None, groups: Tensor | None) -> Tensor:
        """Return (B, T), of rows that count and of others.

        Args:
            logits: (B, T).
            labels: (B, T).
            weights: (B, T) or None.
            groups: (B,) int64 or None, as ``Batch.runs``.
        """
        columns = []
        for task, loss in enumerate(self.all):
            rows: tuple[Any, ...] = (logits[:, task], labels[:, task])
            if loss.within_groups:
                rows += (None if weights is None else weights[:, task], groups)
            columns.append(loss(*rows))
        return torch.stack(columns, dim=1)

    def factors(self) -> list[float]:
        """Return what uncertainty weighting multiplies each task's loss by beside its precision."""
        return [0.5 if loss.is_squared else 1.0 for loss in self.all]

    def links(self) -> dict[str, Link]:
        """Return task -> how its logits become predictions now, of the tasks whose labels are numbers."""
        pairs = zip(self.names, self.all, strict=True)
        return {name: loss.link() for name, loss in pairs if loss.number is not None}


def _key(task: str) -> str:
    """Return a task's name in a ModuleDict, which has names such as "keys" itself and takes none with a dot."""
    return "of_" + task.replace("%", "%25").replace(".", "%2E")


def build_losses(config: TrainConfig, schema: Schema) -> TaskLosses:
    """Make the losses of what evaluations measure: of the labels, and plain ones of the products of labels.

    Raises:
        UserError: a loss for another kind of labels, or within groups that the dataset does not have, or a class of
            one's own that is not there, is no ``TaskLoss``, or does not take these settings; the message has one line.
    """
    return TaskLosses({name: build_loss(name, config, schema) for name in config.measured(schema.labels)})


def build_loss(task: str, config: TrainConfig, schema: Schema) -> TaskLoss:
    """Make the loss of a task; errors as in ``build_losses``."""
    number = schema.number(task)
    settings: LossSettings = config.losses.get(task, CrossEntropyConfig() if number is None else MSEConfig())
    where = f"train.losses.{task}"
    if isinstance(settings, CustomLossConfig):
        found: Any = own_class(settings.path, TaskLoss, where)
        own: Any = own_settings(found, settings.settings, f"{where} {settings.path}")
    else:
        found, own = LOSSES[settings.name], settings
    kind = "binary" if number is None else "number"
    if kind not in found.kinds:
        fits = ", ".join(name for name, loss in LOSSES.items() if kind in loss.kinds)
        raise UserError(
            f"{where}: {settings.name} is for {' or '.join(found.kinds)} labels, this one is {kind}: {fits}"
        )
    if found.within_groups and schema.together is None:
        raise UserError(
            f"{where}: {settings.name} compares the rows of a group, which dataset {schema.name!r} has shuffled apart; "
            "prepare the log with together: COLUMN, such as a request id, or use cross_entropy"
        )
    try:
        loss: TaskLoss = found(own, number)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    check_link(loss, where, number)
    return loss


def check_link(loss: TaskLoss, where: str, number: NumberLabel | None) -> None:
    """Refuse a loss of binary labels whose logits are no log-odds, by which all measures of such labels go."""
    if number is None and loss.link() != SIGMOID:
        raise UserError(f"{where}: a binary label's link must be a sigmoid, this loss's is {loss.link().function}")
