"""DCN v2: explicit bounded-degree feature crosses, beside or below a deep network (Wang et al., WWW 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssr_rec.over_archs.base import SOFTMAX_FLOPS, Flops, OverArch, OverArchSettings, dense_flops
from ssr_rec.over_archs.layers import DenseStack, Initializer, InputNormKind, init_dense_, make_input_norm, sizes


class DCNv2Config(OverArchSettings):
    """DCN v2: full rank, low rank (``rank``), or DCN-Mix (``rank`` and ``num_experts`` above 1)."""

    name: Literal["dcn_v2"] = "dcn_v2"
    num_cross_layers: int = Field(default=3, ge=1, description="cross layers; n of them cross n + 1 features")
    rank: int | None = Field(default=None, ge=1, description="r of each layer's W = U V^T; null: a full W")
    num_experts: int = Field(
        default=1, ge=1, description="above 1: DCN-Mix, as many gated experts in each layer, each of rank r"
    )
    structure: Literal["parallel", "stacked"] = Field(
        default="parallel", description="parallel: cross and deep side by side; stacked: deep on top of cross"
    )
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default=[320, 320, 320], description="width of each ReLU layer of the deep network; empty: cross layers only"
    )
    layer_norm: bool = Field(default=False, description="LayerNorm between each deep layer and its activation")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share dropped after each deep layer")
    input_norm: InputNormKind = Field(
        default="none", description="batch norm of the input, per dim, per field or per dim across fields"
    )
    initializer: Initializer = Field(
        default="glorot", description="glorot: Glorot uniform, zero bias; torch: nn.Linear's own"
    )

    @model_validator(mode="after")
    def _settings_without_effect_are_errors(self) -> DCNv2Config:
        if self.num_experts > 1 and self.rank is None:
            raise ValueError(f"num_experts={self.num_experts} has no effect without a rank: set rank")
        if not self.hidden:
            for key in ("structure", "layer_norm", "dropout"):
                value = getattr(self, key)
                if value != DCNv2Config.model_fields[key].default:
                    raise ValueError(f"{key}={value} has no effect with hidden=[]: remove it, or give hidden")
        return self

    @property
    def label(self) -> str:
        """Cross layers with their rank, if any, and the deep network's widths."""
        name = "DCN v2" if self.num_experts == 1 else "DCN-Mix"
        experts = "" if self.num_experts == 1 else f"{self.num_experts}x"
        cross = f"{name} {self.num_cross_layers} cross" + (f" {experts}r{self.rank}" if self.rank else "")
        if not self.hidden:
            return cross
        return f"{cross}{' + ' if self.structure == 'parallel' else ', then '}{sizes(self.hidden)}"


class CrossLayer(nn.Module):
    """``x_0 * (W x_l + b) + x_l`` (eq. 1), ``W = U V^T`` if there is a rank (eq. 2): (B, N) -> (B, N)."""

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
    """``sum_i G_i E_i + x_l``, ``E_i = x_0 * (U_i tanh(C_i tanh(V_i^T x_l)) + b)`` (eq. 3 and 4): (B, N) -> (B, N).

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
        """Gates: (B, K), each row's sum 1."""
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
    """Cross layers, each fed with the input and the output of the one before: (B, N) -> (B, N).

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
    """Cross network and deep network (paper, section 3.4 and figure 1).

    (B, F*D) -> (B, F*D + hidden[-1]), crosses first; (B, hidden[-1]) when stacked; (B, F*D) without deep network.

    Raises:
        ValueError: the rank is above the width of the input.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: DCNv2Config | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or DCNv2Config()
        if config.rank is not None and config.rank > self.in_features:
            raise ValueError(f"rank={config.rank} is above the input's width {self.in_features}: lower it")
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
