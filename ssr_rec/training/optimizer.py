"""Builds dense and fused sparse optimizers as one."""

from __future__ import annotations

import re

import torch
from torch.optim import Adam
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from ssr_rec.common.errors import UserError
from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.config.optimizer import DenseOptimizerConfig
from ssr_rec.over_archs.base import OverArch
from ssr_rec.training.averaging import Averaging
from ssr_rec.training.muon import Together, ViewMuon


def build_optimizer(
    model: DistributedModelParallel, dense: DenseOptimizerConfig, sparse: EmbeddingsConfig
) -> CombinedOptimizer:
    """Return the model's fused sparse optimizer, AdamW for its over-arch and heads, and an Adam for unfused tables.

    Parameters for which the over-arch brings an optimizer of its own (``OverArch.optimizers``) get that one.

    Raises:
        UserError: ``optimizer.matrices`` asks for Muon, and the over-arch has no matrices.
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

    matrices = [p for name, p in others.items() if dense.matrices == "muon" and is_matrix(name, p)]
    if dense.matrices == "muon" and not matrices:
        raise UserError("optimizer.matrices=muon: the over-arch has no weight matrices; use adamw")

    def of_dense(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        taken = {id(p) for p in matrices}
        left = {name: p for name, p in others.items() if id(p) not in taken}
        decayed = [p for name, p in left.items() if is_decayed(name, p)]
        rest = [p for name, p in left.items() if not is_decayed(name, p)]
        groups = [{"params": decayed, "weight_decay": dense.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=dense.learning_rate, fused=True)
        if not matrices:
            return adamw
        return Together([ViewMuon(matrices, dense.learning_rate, dense.weight_decay), adamw])

    def table_adam(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return Adam(params, sparse.learning_rate, weight_decay=sparse.weight_decay, eps=sparse.eps, fused=True)

    over_arch: KeyedOptimizer = KeyedOptimizerWrapper(others, of_dense)
    if dense.clip_norm is not None:
        over_arch = GradientClippingOptimizer(over_arch, GradientClipping.NORM, dense.clip_norm)
    if dense.ema_decay is not None:
        over_arch = Averaging(over_arch, dense.ema_decay)
    if tables:
        optimizers.append(("tables", KeyedOptimizerWrapper(tables, table_adam)))
    return CombinedOptimizer([*optimizers, ("dense", over_arch)])


UNDECAYED = re.compile(r"(^|\.)(bias|alpha|gamma|[^.]*norm[^.]*(\.[^.]+)?)$")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Return whether weight decay applies: to what is multiplied with an input, so to no bias, norm, alpha or gamma."""
    return parameter.dim() >= 2 and UNDECAYED.search(name) is None


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a weight matrix of the over-arch, or one for each of its views."""
    return ".over_arch." in name and parameter.dim() in (2, 3) and is_decayed(name, parameter)
