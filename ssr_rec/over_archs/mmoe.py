"""MMoE shares experts between all tasks and mixes them by a gate per task (Ma et al., KDD 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.over_archs.base import SOFTMAX_FLOPS, Flops, OverArch, dense_flops
from ssr_rec.over_archs.layers import Dropout, ViewLinear, init_dense_, make_input_norm
from ssr_rec.over_archs.settings import ExpertSettings, MMoEConfig


class ReluStacks(nn.Module):
    """Runs V stacks of ReLU layers, each over its own input: (V, B, in) -> (V, B, hidden[-1]); empty: the identity."""

    def __init__(self, num_stacks: int, fan_in: int, hidden: Sequence[int], config: ExpertSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ViewLinear(num_stacks, before, after, config.initializer) for before, after in pairwise([fan_in, *hidden])
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return x

    def flops(self) -> Flops:
        total = Flops()
        for layer in self.layers:
            dense = cast(ViewLinear, layer)
            total += dense.flops() + Flops(elementwise=dense.bias.numel())
        return total


class Experts(nn.Module):
    """Runs V stacks of ReLU layers over the same input: (B, in) -> (V, B, hidden[-1]).

    The first layers are one dense layer of V times the width, so that neither the input nor its gradient is held
    V times.
    """

    def __init__(self, num_experts: int, fan_in: int, config: ExpertSettings) -> None:
        super().__init__()
        width = config.expert_hidden[0]
        self.num_experts = num_experts
        self.first = nn.Linear(fan_in, num_experts * width)
        init_dense_(self.first.weight, self.first.bias, fan_in, width, config.initializer)
        self.dropout = Dropout(config.dropout)
        self.rest = ReluStacks(num_experts, width, config.expert_hidden[1:], config)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(F.relu(self.first(x)))
        return self.rest(h.unflatten(1, (self.num_experts, -1)).transpose(0, 1))

    def flops(self) -> Flops:
        relu = Flops(elementwise=self.first.out_features)
        return dense_flops(self.first.in_features, self.first.out_features) + relu + self.rest.flops()


class MMoE(OverArch):
    """Computes MMoE, eq. 6 to 8: (B, F*D) -> (B, T, tower_hidden[-1]), or (B, T, expert_hidden[-1]) without towers.

    For task k ``f_k(x) = sum_i g_k(x)_i expert_i(x)`` with ``g_k(x) = softmax(W_k x)`` over the experts, no bias.
    The features of a task are ``tower_k(f_k(x))``.
    """

    task_parts = ("gates", "towers")

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: MMoEConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or MMoEConfig()
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.experts = Experts(config.num_experts, self.in_features, config)
        self.gates = nn.Linear(self.in_features, num_tasks * config.num_experts, bias=False)
        init_dense_(self.gates.weight, None, self.in_features, config.num_experts, config.initializer)
        self.towers = ReluStacks(num_tasks, config.expert_hidden[-1], config.tower_hidden, config)
        self.out_features = (config.tower_hidden or config.expert_hidden)[-1]

    def gate(self, x: Tensor) -> Tensor:
        """Return each task's weights of the experts: (B, F*D) -> (B, T, num_experts), sums of 1."""
        return self.gates(x).unflatten(1, (self.num_tasks, -1)).softmax(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        mixtures = torch.bmm(self.gate(x), self.experts(x).transpose(0, 1))
        return self.towers(mixtures.transpose(0, 1)).transpose(0, 1)

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        gates, width = self.gates.out_features, self.config.expert_hidden[-1]
        softmax_and_mixture = Flops(matmul=2 * gates * width, elementwise=SOFTMAX_FLOPS * gates)
        total += self.experts.flops() + dense_flops(self.in_features, gates, bias=False) + softmax_and_mixture
        return total + self.towers.flops()
