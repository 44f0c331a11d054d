"""Builds dense and fused sparse optimizers as one, and the learning-rate schedule."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.optim import Adam
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.config.optimizer import DenseOptimizerConfig
from ssr_rec.over_archs.base import OverArch
from ssr_rec.training.lazy_adam import LazyAdam


def build_optimizer(
    model: DistributedModelParallel, dense: DenseOptimizerConfig, sparse: EmbeddingsConfig
) -> CombinedOptimizer:
    """Return the model's fused sparse optimizer, AdamW for its over-arch and heads, and an Adam for unfused tables.

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
        decayed = [p for name, p in others.items() if is_decayed(name, p)]
        rest = [p for name, p in others.items() if not is_decayed(name, p)]
        groups = [{"params": decayed, "weight_decay": dense.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=dense.learning_rate, fused=True)

    def table_adam(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": sparse.learning_rate, "weight_decay": sparse.weight_decay, "eps": sparse.eps}
        return LazyAdam(params, **settings) if sparse.optimizer == "lazy_adam" else Adam(params, fused=True, **settings)

    over_arch: KeyedOptimizer = KeyedOptimizerWrapper(others, adamw)
    if dense.clip_norm is not None:
        over_arch = GradientClippingOptimizer(over_arch, GradientClipping.NORM, dense.clip_norm)
    if tables:
        optimizers.append(("tables", KeyedOptimizerWrapper(tables, table_adam)))
    # The last one's learning rate is what progress rows show.
    return CombinedOptimizer([*optimizers, ("dense", over_arch)])


UNDECAYED = re.compile(r"(^|\.)(bias|alpha|gamma|[^.]*norm[^.]*(\.[^.]+)?)$")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Return whether weight decay applies: to what is multiplied with an input, so to no bias, norm, alpha or gamma."""
    return parameter.dim() >= 2 and UNDECAYED.search(name) is None


class Schedule:
    """Raises every learning rate of an optimizer linearly at first (warm-up), then keeps it constant.

    Args:
        steps_before: of earlier runs, whose optimizer state this one goes on with.

    The fused optimizer hands its group's rate to FBGEMM at ``zero_grad`` and ``step``, so setting groups is enough.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, steps_before: int = 0) -> None:
        self.groups = list(optimizer.param_groups)
        self.base = [group["lr"] for group in self.groups]
        self.warmup_steps, self.steps_before = warmup_steps, steps_before

    def factor(self, step: int) -> float:
        """Return the factor of the base rates for the update number ``step`` (from 0)."""
        return min(1.0, (self.steps_before + step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def set(self, step: int) -> None:
        for group, base in zip(self.groups, self.base, strict=True):
            group["lr"] = base * self.factor(step)
