"""DCN v2 crosses features explicitly, to a bounded degree, beside or below a deep network (Wang et al., WWW 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import SOFTMAX_FLOPS, Flops, OverArch, dense_flops
from ssr_rec.over_archs.layers import DenseStack, init_dense_, make_input_norm
from ssr_rec.over_archs.settings import DCNv2Config


class CrossLayer(nn.Module):
    """Computes ``x_0 * (W x_l + b) + x_l`` (eq. 1), ``W = U V^T`` if there is a rank (eq. 2): (B, N) -> (B, N)."""

    def __init__(self, width: int, config: DCNv2Config) -> None:
        super().__init__()
        inner = config.rank or width
        self.down = nn.Linear(width, inner, bias=False) if config.rank else None
        self.up = nn.Linear(inner, width)
        if self.down is not None:
            init_dense_(self.down.weight, None, width, inner, config.initializer)
        init_dense_(self.up.weight, self.up.bias, inner, width, config.initializer)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.up(x if self.down is None else self.down(x)) + x

    def flops(self) -> Flops:
        inner, width = self.up.in_features, self.up.out_features
        down = dense_flops(width, inner, bias=False) if self.down is not None else Flops()
        return down + dense_flops(inner, width) + Flops(elementwise=2 * width)


class MixtureCrossLayer(nn.Module):
    """Gives ``sum_i G_i E_i + x_l``, ``E_i = x_0 * (U_i tanh(C_i tanh(V_i^T x_l)) + b)`` (eq. 3, 4): (B, N) -> (B, N).

    The gates sum to 1, so the sum is ``x_0 * ([U_1 .. U_K] [G_1 h_1 .. G_K h_K] + b)``: one product for all experts.
    """

    def __init__(self, width: int, config: DCNv2Config) -> None:
        super().__init__()
        rank, experts = config.rank or width, config.num_experts
        self.down = nn.Linear(width, experts * rank, bias=False)
        self.core = nn.Parameter(torch.empty(experts, rank, rank))
        self.up = nn.Linear(experts * rank, width)
        init_dense_(self.down.weight, None, width, rank, config.initializer)
        init_dense_(self.core, None, rank, rank, config.initializer)
        init_dense_(self.up.weight, self.up.bias, rank, width, config.initializer)

    def forward(self, x0: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Mix the experts by gates (B, K), each row's sum 1."""
        experts = self.core.shape[0]
        h = torch.tanh(self.down(x)).unflatten(1, (experts, -1)).transpose(0, 1)
        h = torch.tanh(torch.bmm(h, self.core)).transpose(0, 1)
        return x0 * self.up((gates.unsqueeze(2) * h).flatten(1)) + x

    def flops(self) -> Flops:
        experts, rank, _ = self.core.shape
        inner, width = self.up.in_features, self.up.out_features
        core = Flops(matmul=2 * experts * rank * rank, elementwise=3 * inner)
        outer = dense_flops(width, inner, bias=False) + dense_flops(inner, width)
        return core + outer + Flops(elementwise=2 * width)


class CrossNetwork(nn.Module):
    """Stacks cross layers, each fed with the input and the output of the one before: (B, N) -> (B, N).

    DCN-Mix has one set of gates for all layers: a softmax over the experts, without bias.
    """

    def __init__(self, width: int, config: DCNv2Config) -> None:
        super().__init__()
        mixture = config.num_experts > 1
        layer = MixtureCrossLayer if mixture else CrossLayer
        self.layers = nn.ModuleList(layer(width, config) for _ in range(config.num_cross_layers))
        self.gates = nn.Linear(width, config.num_experts, bias=False) if mixture else None
        if self.gates is not None:
            init_dense_(self.gates.weight, None, width, 1, config.initializer)

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.layers:
            x = layer(x0, x) if self.gates is None else layer(x0, x, torch.softmax(self.gates(x), 1))
        return x

    def flops(self) -> Flops:
        gates = Flops()
        if self.gates is not None:
            experts = self.gates.out_features
            gates = dense_flops(self.gates.in_features, experts, bias=False)
            gates += Flops(elementwise=SOFTMAX_FLOPS * experts)
        total = Flops()
        for layer in self.layers:
            total += gates + cast(CrossLayer | MixtureCrossLayer, layer).flops()
        return total


class DCNv2(OverArch):
    """Joins a cross network and a deep network (paper, section 3.4 and figure 1).

    (B, F*D) -> (B, F*D + hidden[-1]), crosses first; (B, hidden[-1]) when stacked; (B, F*D) without deep network.

    Raises:
        UserError: the rank is above the width of the input.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: DCNv2Config | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or DCNv2Config()
        if config.rank is not None and config.rank > self.in_features:
            raise UserError(f"rank={config.rank} is above the input's width {self.in_features}: lower it")
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.cross = CrossNetwork(self.in_features, config)
        self.deep = DenseStack(
            self.in_features,
            config.hidden,
            config.initializer,
            layer_norm=config.layer_norm,
            dropout=config.dropout,
        )
        self.side_by_side = bool(config.hidden) and config.structure == "parallel"
        self.out_features = config.hidden[-1] if config.hidden else self.in_features
        if self.side_by_side:
            self.out_features += self.in_features

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        crosses = self.cross(x)
        return torch.cat([crosses, self.deep(x)], 1) if self.side_by_side else self.deep(crosses)

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        return total + self.cross.flops() + self.deep.flops()
