"""PLE gives each task experts of its own beside the shared ones, level on level (Tang et al., RecSys 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ssr_rec.over_archs.base import SOFTMAX_FLOPS, Flops, OverArch, dense_flops
from ssr_rec.over_archs.layers import init_dense_, make_input_norm
from ssr_rec.over_archs.mmoe import Experts, ReluStacks
from ssr_rec.over_archs.settings import PLEConfig


class Extraction(nn.Module):
    """Runs one level of PLE, a customised gate control: (T + 1, B, in) -> (T + 1, B, expert_hidden[-1]).

    The first T inputs and outputs are the tasks', the last is the shared one, which the last level has no output for.
    Experts stand in the order task 1, ..., task T, shared, each fed with the input of its owner. The gate of a task
    weighs its own experts and the shared ones, the shared gate all of them (eq. 5 to 7), without bias.
    """

    owners: Tensor

    def __init__(self, num_tasks: int, fan_in: int, level: int, config: PLEConfig) -> None:
        super().__init__()
        own, shared = config.num_task_experts, config.num_shared_experts
        total, last = num_tasks * own + shared, level == config.num_levels - 1
        of_all = list(range(total))
        self.seen = [of_all[k * own : (k + 1) * own] + of_all[num_tasks * own :] for k in range(num_tasks)]
        self.seen += [] if last else [of_all]
        owners = [k for k in range(num_tasks) for _ in range(own)] + [num_tasks] * shared
        self.register_buffer("owners", torch.tensor(owners), persistent=False)
        self.experts: Experts | ReluStacks
        if level == 0:  # where all inputs are one
            self.experts = Experts(total, fan_in, config)
        else:
            self.experts = ReluStacks(total, fan_in, config.expert_hidden, config)
        self.gates = nn.ModuleList(nn.Linear(fan_in, len(seen), bias=False) for seen in self.seen)
        for gate, seen in zip(self.gates, self.seen, strict=True):
            init_dense_(cast(nn.Linear, gate).weight, None, fan_in, len(seen), config.initializer)
        self.width = config.expert_hidden[-1]

    def shares(self, inputs: Tensor) -> list[Tensor]:
        """Return each gate's weights of the experts it sees: (B, number of them), sums of 1."""
        return [gate(one).softmax(1) for gate, one in zip(self.gates, inputs, strict=False)]

    def forward(self, inputs: Tensor) -> Tensor:
        is_first = isinstance(self.experts, Experts)
        experts = self.experts(inputs[0] if is_first else inputs[self.owners]).transpose(0, 1)
        shares = self.shares(inputs)
        mixed = [torch.bmm(one.unsqueeze(1), experts[:, seen]) for one, seen in zip(shares, self.seen, strict=True)]
        return torch.cat(mixed, 1).transpose(0, 1)

    def flops(self) -> Flops:
        total = self.experts.flops()
        for gate in self.gates:
            fan_in, seen = cast(nn.Linear, gate).in_features, cast(nn.Linear, gate).out_features
            total += dense_flops(fan_in, seen, bias=False)
            total += Flops(matmul=2 * seen * self.width, elementwise=SOFTMAX_FLOPS * seen)
        return total


class PLE(OverArch):
    """Computes progressive layered extraction: (B, F*D) -> (B, T, tower_hidden[-1]), or (B, T, expert_hidden[-1])."""

    task_parts = ("levels", "towers")

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: PLEConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or PLEConfig()
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        widths = [self.in_features] + [config.expert_hidden[-1]] * (config.num_levels - 1)
        self.levels = nn.ModuleList(Extraction(num_tasks, width, i, config) for i, width in enumerate(widths))
        self.towers = ReluStacks(num_tasks, config.expert_hidden[-1], config.tower_hidden, config)
        self.out_features = (config.tower_hidden or config.expert_hidden)[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x).unsqueeze(0).expand(self.num_tasks + 1, -1, -1)
        for level in self.levels:
            x = level(x)
        return self.towers(x).transpose(0, 1)

    def flops(self) -> Flops:
        total = self.input_norm.flops() + self.towers.flops()
        for level in self.levels:
            total += cast(Extraction, level).flops()
        return total
