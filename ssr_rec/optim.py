"""Dense and fused sparse optimizers as one, and the learning-rate schedule."""

from __future__ import annotations

import torch
from pydantic import Field
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ssr_rec.embeddings import EmbeddingsConfig
from ssr_rec.over_archs import OverArch
from ssr_rec.settings import Settings


class DenseOptimizerConfig(Settings):
    """Adam for the over-arch and the heads."""

    learning_rate: float = Field(1e-3, ge=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled (AdamW), on weights of two or more dims only")
    clip_norm: float | None = Field(
        None, gt=0, description="largest L2 norm of the over-arch's gradient; None: no clipping"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps over which dense and sparse learning rates rise from 0, linearly"
    )


def build_optimizer(
    model: DistributedModelParallel, dense: DenseOptimizerConfig, sparse: EmbeddingsConfig
) -> CombinedOptimizer:
    """The model's fused sparse optimizer, Adam for its over-arch and heads, and Adam for unfused tables.

    Parameters for which the over-arch brings an optimizer of its own (``OverArch.optimizers``) get that one.
    """
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    tables = {name: p for name, p in parameters.items() if ".embedding_bags." in name}
    optimizers: list[tuple[str, KeyedOptimizer]] = [("fused", model.fused_optimizer)]
    own = set()
    for module in model.modules():
        for key, make in module.optimizers.items() if isinstance(module, OverArch) else ():
            name = next(n for n, p in parameters.items() if p is module.get_parameter(key))
            own.add(name)
            optimizers.append((key, KeyedOptimizerWrapper({name: parameters[name]}, make)))
    others = {name: p for name, p in parameters.items() if name not in tables and name not in own}

    def adamw(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": dense.weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=dense.learning_rate, fused=True)

    def table_adam(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            params, lr=sparse.learning_rate, weight_decay=sparse.weight_decay, eps=sparse.eps, fused=True
        )

    over_arch: KeyedOptimizer = KeyedOptimizerWrapper(others, adamw)
    if dense.clip_norm is not None:
        over_arch = GradientClippingOptimizer(over_arch, GradientClipping.NORM, dense.clip_norm)
    if tables:
        optimizers.append(("tables", KeyedOptimizerWrapper(tables, table_adam)))
    # The last one's learning rate is what progress rows show.
    return CombinedOptimizer([*optimizers, ("dense", over_arch)])


class Schedule:
    """Linear warm-up of every learning rate of an optimizer, then constant.

    Args:
        steps_before: of earlier runs, whose optimizer state this one goes on with.

    The fused optimizer hands its group's rate to FBGEMM at ``zero_grad`` and ``step``, so setting groups is enough.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, steps_before: int = 0) -> None:
        self.groups = list(optimizer.param_groups)
        self.base = [group["lr"] for group in self.groups]
        self.warmup_steps, self.steps_before = warmup_steps, steps_before

    def factor(self, step: int) -> float:
        """Of the base rates, for the update number ``step`` (from 0)."""
        return min(1.0, (self.steps_before + step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def set(self, step: int) -> None:
        for group, base in zip(self.groups, self.base, strict=True):
            group["lr"] = base * self.factor(step)
