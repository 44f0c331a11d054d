"""CTRModel: tables + over-arch + heads; TrainTask adds the loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ssr_rec.data.batch import Batch
from ssr_rec.embeddings import ConcatFields
from ssr_rec.managed import ManagedIds
from ssr_rec.over_archs import OverArch
from ssr_rec.over_archs.layers import Dropout, ViewLinear
from ssr_rec.settings import Settings


class HeadsConfig(Settings):
    """What follows the over-arch for each task: its tower, then one linear unit."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="widths of the ReLU layers of every task's own tower; none: shared features to linear heads"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of activations dropped after each tower layer")


class Heads(nn.Module):
    """A tower and a linear head per task: features (B, H), shared, or (B, T, H), each task's own, to logits (B, T)."""

    def __init__(self, out_features: int, num_tasks: int, config: HeadsConfig | None = None) -> None:
        super().__init__()
        config = config or HeadsConfig()
        widths = [out_features, *config.hidden]
        self.towers = nn.ModuleList(
            ViewLinear(num_tasks, fan_in, fan_out, "glorot") for fan_in, fan_out in pairwise(widths)
        )
        self.dropout = Dropout(config.dropout)
        self.weight = nn.Parameter(torch.empty(num_tasks, widths[-1]))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        if self.towers:
            tasks = len(self.bias)
            by_task = features.expand(tasks, *features.shape) if features.dim() == 2 else features.transpose(0, 1)
            for tower in self.towers:
                by_task = self.dropout(torch.relu(tower(by_task)))
            features = by_task.transpose(0, 1)
        if features.dim() == 2:
            return features @ self.weight.t() + self.bias
        return (features * self.weight).sum(dim=-1) + self.bias


class DenseArch(nn.Module):
    """All that is not a table: embeddings to the input vector, the over-arch, the heads.

    A module of its own because TorchRec's pipeline traces the parts that hold tables and leaves the others alone.

    Args:
        bf16: run the over-arch and heads in bfloat16 by autocast; parameters, tables and logits stay float32.
    """

    def __init__(
        self,
        feature_names: list[str],
        over_arch: OverArch,
        num_tasks: int,
        heads: HeadsConfig | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.concat = ConcatFields(feature_names, over_arch.extra_tables)
        self.over_arch = over_arch
        self.heads = Heads(over_arch.out_features, num_tasks, heads)
        self.bf16 = bf16

    def forward(self, embeddings: KeyedTensor) -> Tensor:
        inputs = self.concat(embeddings)
        with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = self.over_arch(*inputs)
            if isinstance(features, Tensor):
                return self.heads(features).float()
            features, logits = features
            return self.heads(features).float() + logits.float()


class CTRModel(nn.Module):
    """Ids to logits: ``forward(sparse: KeyedJaggedTensor of B rows) -> (B, T)``.

    Args:
        managed: says which row an id has now, where tables are smaller than the range of ids.
    """

    def __init__(self, tables: EmbeddingBagCollection, dense: DenseArch, managed: ManagedIds | None = None) -> None:
        super().__init__()
        self.tables = tables
        self.dense = dense
        self.managed = managed

    def forward(self, sparse: KeyedJaggedTensor) -> Tensor:
        if self.managed is not None:
            sparse = self.managed(sparse)
        return self.dense(self.tables(sparse))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of every batch norm's running mean and variance."""
    return {name: b for name, b in model.named_buffers() if name.endswith((".running_mean", ".running_var"))}


def average_running_statistics(model: nn.Module) -> None:
    """Make one model of the ranks' for evaluation: each has seen its own share of every batch. Collective.

    Training does not read these statistics, and the average of running averages is that of the averaged batches.
    """
    for buffer in running_statistics(model).values():
        dist.all_reduce(buffer)
        buffer /= dist.get_world_size()


class TrainTask(nn.Module):
    """``forward(batch) -> (loss, (loss, logits, labels, group_ids))``, what TorchRec's pipelines expect.

    The loss to differentiate is this rank's part of the global mean, times the world size: DDP and TorchRec both
    average gradients over ranks, so ranks with more rows weigh more and the step equals that of one process.
    The returned loss is the plain part, to be summed over ranks.

    Args:
        task_weights: weight of each task's mean cross-entropy in the loss, in label order; scaled to sum to 1.
    """

    def __init__(self, model: CTRModel, task_weights: list[float]) -> None:
        super().__init__()
        self.model = model
        self.loss = WeightedCrossEntropy(task_weights)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        logits = self.model(batch.sparse)
        loss = self.loss(logits, batch.labels) / batch.global_rows
        return loss * self.world_size, (loss.detach(), logits.detach(), batch.labels, batch.group_ids)


class WeightedCrossEntropy(nn.Module):
    """Sum over rows of the tasks' weighted mean of binary cross-entropy, nats."""

    weights: Tensor

    def __init__(self, task_weights: list[float]) -> None:
        super().__init__()
        weights = torch.tensor(task_weights)
        self.register_buffer("weights", weights / weights.sum(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, labels, weight=self.weights, reduction="sum")
