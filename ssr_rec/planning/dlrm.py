"""Counts the dense part of TorchRec's DLRM, the model of the published runs that the planner is held against."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.planning.costs import FORWARD_BACKWARD, PROBE_ROWS, DenseCost, Kept, Operators

DENSE_FEATURES, DIM = 13, 128
DENSE_ARCH, OVER_ARCH = (512, 256, DIM), (1024, 1024, 512, 256, 1)
CROSS_LAYERS, CROSS_RANK = 3, 512
STEPS_OF_A_PARAMETER = {"sgd": 2, "adagrad": 7}
"""Operators that torch's loops over parameters launch for each: zeroing its gradient, and its update."""


class DLRM(nn.Module):
    """Mixes pooled vectors (rows, features * DIM) with dense floats (rows, 13), as torchrec/models/dlrm.py does."""

    def __init__(self, features: int, interaction: Literal["dot", "dcn"]) -> None:
        super().__init__()
        self.vectors, self.dense_arch = features + 1, _mlp(DENSE_FEATURES, DENSE_ARCH)
        width = self.vectors * DIM
        crosses = CROSS_LAYERS if interaction == "dcn" else 0
        self.crosses = nn.ModuleList(
            nn.Sequential(nn.Linear(width, CROSS_RANK, bias=False), nn.Linear(CROSS_RANK, width))
            for _ in range(crosses)
        )
        pairs = self.vectors * (self.vectors - 1) // 2
        self.over_arch = _mlp(width if crosses else DIM + pairs, OVER_ARCH)[:-1]  # a logit has no ReLU

    def forward(self, floats: Tensor, pooled: Tensor) -> Tensor:
        dense = self.dense_arch(floats)
        x = torch.cat([dense, pooled], dim=1)
        if self.crosses:
            crossed = x
            for cross in self.crosses:
                crossed = x * cross(crossed) + crossed
            return self.over_arch(crossed)
        vectors = x.view(len(x), self.vectors, DIM)
        first, second = torch.triu_indices(self.vectors, self.vectors, offset=1)
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))[:, first, second]
        return self.over_arch(torch.cat([dense, pairs], dim=1))


def _mlp(width: int, sizes: tuple[int, ...]) -> nn.Sequential:
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise((width, *sizes))]
    return nn.Sequential(*(module for pair in layers for module in pair))


def dlrm_cost(features: int, interaction: Literal["dot", "dcn"], optimizer: Literal["sgd", "adagrad"]) -> DenseCost:
    """Count a DLRM of so many tables of ``DIM`` as ``costs.dense_cost`` counts an over-arch."""
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        model = DLRM(features, interaction)
        kept_bytes = []
        for rows in PROBE_ROWS:
            floats, pooled = torch.empty(rows, DENSE_FEATURES), torch.empty(rows, features * DIM, requires_grad=True)
            kept, forward, products = Kept([*model.parameters()]), Operators(), FlopCounterMode(display=False)
            with products, kept, forward:
                F.binary_cross_entropy_with_logits(model(floats, pooled), torch.empty(rows, 1))
            kept_bytes.append(kept.bytes)
        per_row = (kept_bytes[1] - kept_bytes[0]) / (PROBE_ROWS[1] - PROBE_ROWS[0])
        parameters = list(model.parameters())
        return DenseCost(
            parameters=sum(p.numel() for p in parameters),
            buffer_bytes=0,
            matmul_flops=products.get_total_flops() // PROBE_ROWS[1],
            activation_bytes=per_row,
            fixed_bytes=max(0.0, kept_bytes[0] - per_row * PROBE_ROWS[0]),
            operators=FORWARD_BACKWARD * forward.operators + STEPS_OF_A_PARAMETER[optimizer] * len(parameters),
        )
