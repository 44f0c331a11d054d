"""CTRModel: tables + over-arch + heads; TrainTask adds the loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ssr_rec.data.batch import Batch
from ssr_rec.embeddings import ConcatFields
from ssr_rec.over_archs import OverArch


class Heads(nn.Module):
    """One linear head per task: (B, H) shared features, or (B, T, H) features of each task, to logits (B, T)."""

    def __init__(self, out_features: int, num_tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, out_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 2:
            return features @ self.weight.t() + self.bias
        return (features * self.weight).sum(dim=-1) + self.bias


class DenseArch(nn.Module):
    """All that is not a table: embeddings to the input vector, the over-arch, the heads.

    A module of its own because TorchRec's pipeline traces the parts that hold tables and leaves the others alone.

    Args:
        bf16: run the over-arch and heads in bfloat16 by autocast; parameters, tables and logits stay float32.
    """

    def __init__(self, feature_names: list[str], over_arch: OverArch, num_tasks: int, bf16: bool = False) -> None:
        super().__init__()
        self.concat = ConcatFields(feature_names)
        self.over_arch = over_arch
        self.heads = Heads(over_arch.out_features, num_tasks)
        self.bf16 = bf16

    def forward(self, embeddings: KeyedTensor) -> Tensor:
        x = self.concat(embeddings)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.heads(self.over_arch(x))
        return logits.float()


class CTRModel(nn.Module):
    """Ids to logits: ``forward(sparse: KeyedJaggedTensor of B rows) -> (B, T)``."""

    def __init__(self, tables: EmbeddingBagCollection, dense: DenseArch) -> None:
        super().__init__()
        self.tables = tables
        self.dense = dense

    def forward(self, sparse: KeyedJaggedTensor) -> Tensor:
        return self.dense(self.tables(sparse))


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
