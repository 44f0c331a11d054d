"""Computes the training loss: the model and the weighted losses of its tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ssr_rec.data.batch import Batch
from ssr_rec.metrics.links import Link
from ssr_rec.model.ctr_model import CTRModel
from ssr_rec.model.losses.registry import TaskLosses


class TrainTask(nn.Module):
    """Gives ``forward(batch) -> (loss, (loss, logits, labels, weights, group_ids))``, as TorchRec's pipelines expect.

    The loss to differentiate is this rank's part of the global mean, times the world size: DDP and TorchRec both
    average gradients over ranks, so ranks with more rows weigh more and the step equals that of one process.
    The returned loss is the plain part, to be summed over ranks.

    Args:
        task_weights: weight of each task's mean loss, in label order; scaled to sum to 1.
        negatives: share of the negative rows that training sees. Of such rows the odds are ``1 / negatives`` times
            those of all, so the loss is of the logits plus ``-log(negatives)``, and the logits themselves are of all.
        entire_space: pairs of a task and the one that it follows, see ``EntireSpace``.
        losses: of the tasks, then of the products of ``entire_space``; None: cross-entropy.
        uncertain: weigh the tasks by learned uncertainties as well, see ``MeanLoss``.
    """

    def __init__(
        self,
        model: CTRModel,
        task_weights: list[float],
        negatives: float = 1.0,
        entire_space: Sequence[tuple[int, int]] = (),
        losses: TaskLosses | None = None,
        uncertain: bool = False,
    ) -> None:
        super().__init__()
        task_weights = [*task_weights, *(task_weights[task] for task, _ in entire_space)]
        for task, _ in entire_space:
            task_weights[task] = 0.0  # it is trained by its product alone
        self.products = EntireSpace(entire_space) if entire_space else None
        self.model = model
        self.shift = -math.log(negatives)
        self.loss = MeanLoss(task_weights, losses, uncertain)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
        logits, labels, weights = self.model(batch.sparse, batch.dense, batch.item_weights), batch.labels, batch.weights
        if self.products is not None:
            logits, labels, weights = self.products(logits, labels, weights)
        sampled = logits + self.shift if self.training and self.shift else logits
        loss = self.loss(sampled, labels, weights, batch.global_rows, batch.runs)
        return loss * self.world_size, (loss.detach(), logits.detach(), labels, weights, batch.group_ids)


class EntireSpace(nn.Module):
    """Adds the product of two tasks as a further one: a conversion on all rows is a click and a conversion after it.

    So the head of the conversion given a click learns from all rows, not from clicks alone, and its probability is
    still that on clicks (Ma et al., "Entire Space Multi-Task Model", SIGIR 2018). Only the product has a loss.

    Args:
        pairs: a task whose labels are observed where that of the other is 1, and the other.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.tasks, self.before = ([pair[i] for pair in pairs] for i in (0, 1))

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, labels and weights (B, T) with a further column for each pair, (B, T + P)."""
        task, before = logits[:, self.tasks], logits[:, self.before]
        product = logsigmoid(before) + logsigmoid(task)
        # 1 - pq = (1 - p) + p (1 - q), which no cancellation touches.
        others = torch.logaddexp(logsigmoid(-before), logsigmoid(before) + logsigmoid(-task))
        outcome = labels[:, self.before] * labels[:, self.tasks]
        counts = torch.where(labels[:, self.before] > 0, weights[:, self.tasks], weights[:, self.before])
        columns = (logits, product - others), (labels, outcome), (weights, counts)
        x, y, w = (torch.cat(parts, 1) for parts in columns)
        return x, y, w


class MeanLoss(nn.Module):
    """Computes this rank's part of the mean loss of a global batch.

    Where rows have weights, each task's mean is over the sum of its weights in the global batch: a row of weight 2 is
    the row twice, and a task that a batch has no row of adds nothing. It is a module of its own because TorchRec's
    pipeline traces ``TrainTask`` and leaves parts without tables alone.

    Uncertain, a task of mean loss L counts as ``L exp(-s) + s / 2`` with a learned s, the logarithm of a variance that
    begins at 1; of squared errors L is the half (Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh
    Losses", CVPR 2018, eq. 7 and 10).

    Args:
        task_weights: as for ``TrainTask``.
        losses: as for ``TrainTask``.
        uncertain: as for ``TrainTask``.
    """

    def __init__(self, task_weights: list[float], losses: TaskLosses | None = None, uncertain: bool = False) -> None:
        super().__init__()
        self.cross_entropy = WeightedCrossEntropy(task_weights)
        self.is_plain = (losses is None or losses.is_plain) and not uncertain
        self.losses = losses
        self.log_variances = nn.Parameter(torch.zeros(len(task_weights))) if uncertain else None
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def links(self) -> dict[str, Link]:
        """Return task -> how its logits become predictions now, of the tasks whose labels are numbers."""
        return self.losses.links() if self.losses is not None else {}

    def figures(self) -> dict[str, dict[str, float]]:
        """Return what a progress row says of the loss: of uncertain tasks, by what each is multiplied now."""
        if self.log_variances is None or self.losses is None:
            return {}
        precisions = torch.exp(-self.log_variances.detach()).tolist()
        return {"task_weights": dict(zip(self.losses.names, precisions, strict=True))}

    def forward(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None, global_rows: int, groups: Tensor | None = None
    ) -> Tensor:
        """Return the part, a number. Collective where there are weights.

        Args:
            logits: (B, T).
            labels: (B, T).
            weights: (B, T) or None, as ``Batch`` has them.
            global_rows: rows of the global batch.
            groups: (B,) int64 or None, as ``Batch.runs``.
        """
        if weights is None:
            if self.is_plain:
                return self.cross_entropy(logits, labels) / global_rows
            of_tasks = self._of_tasks(logits, labels, None, groups).sum(0) / global_rows
            return self._joined(of_tasks, torch.ones_like(of_tasks))
        totals = weights.sum(0, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(totals)
        divisors = torch.where(totals > 0, totals, 1.0).to(logits.dtype)
        if self.is_plain:
            return (self.cross_entropy.by_task(logits, labels, weights) / divisors).sum()
        of_tasks = self._of_tasks(logits, labels, weights, groups).sum(0) / divisors
        return self._joined(of_tasks, (totals > 0).to(of_tasks.dtype))

    def _of_tasks(self, logits: Tensor, labels: Tensor, weights: Tensor | None, groups: Tensor | None) -> Tensor:
        """Return the losses (B, T) times the rows' weights."""
        assert self.losses is not None
        rows = self.losses(logits, labels, weights, groups)
        return rows if weights is None else torch.where(weights > 0, rows, 0.0) * weights

    def _joined(self, of_tasks: Tensor, seen: Tensor) -> Tensor:
        """Return one number of this rank's parts (T,) of the tasks' means; ``seen`` (T,): 0 of a task without rows."""
        if self.log_variances is not None and self.losses is not None:
            s, halves = self.log_variances, of_tasks.new_tensor(self.losses.factors())
            of_tasks = of_tasks * halves * torch.exp(-s) + s * seen / (2 * self.world_size)
        return (of_tasks * self.cross_entropy.weights).sum()


class WeightedCrossEntropy(nn.Module):
    """Sums over rows the tasks' weighted mean of binary cross-entropy, in nats."""

    weights: Tensor

    def __init__(self, task_weights: list[float]) -> None:
        super().__init__()
        weights = torch.tensor(task_weights)
        self.register_buffer("weights", weights / weights.sum(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, labels, weight=self.weights, reduction="sum")

    def by_task(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the sum of each task (T,), of rows that count by their weights ``rows`` (B, T)."""
        weights = self.weights * rows
        return binary_cross_entropy_with_logits(logits, labels, weight=weights, reduction="none").sum(0)
