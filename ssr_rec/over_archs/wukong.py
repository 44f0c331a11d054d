"""Wukong stacks factorization machines beside linear compression (Zhang et al., ICML 2024, arXiv 2403.02545)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ssr_rec.over_archs.base import LAYER_NORM_FLOPS, Flops, OverArch, dense_flops, equal_dim
from ssr_rec.over_archs.layers import DenseStack, init_dense_, make_input_norm
from ssr_rec.over_archs.settings import Initializer, WukongConfig


class RowMix(nn.Module):
    """Computes ``W X``: linear combinations of embeddings, no bias: (B, n, D) -> (B, m, D)."""

    def __init__(self, rows_in: int, rows_out: int, initializer: Initializer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows_out, rows_in))
        init_dense_(self.weight, None, rows_in, rows_out, initializer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.weight, x)

    def flops(self, dim: int) -> Flops:
        rows_out, rows_in = self.weight.shape
        return Flops(matmul=2 * rows_out * rows_in * dim)


class FactorizationMachineBlock(nn.Module):
    """Gives ``reshape(MLP(LN(flatten(X X^T Y))))``: pairwise dot products made embeddings: (B, n, D) -> (B, n_F, D)."""

    def __init__(self, rows: int, dim: int, config: WukongConfig) -> None:
        super().__init__()
        self.rows, self.dim = rows, dim
        self.projection = RowMix(rows, config.fm_rank, config.initializer)
        self.norm = nn.LayerNorm(rows * config.fm_rank, eps=config.layer_norm_eps)
        self.layers = DenseStack(rows * config.fm_rank, config.fmb_hidden, config.initializer, dropout=config.dropout)
        width = config.fmb_hidden[-1] if config.fmb_hidden else rows * config.fm_rank
        self.out = nn.Linear(width, config.fmb_embeddings * dim)
        init_dense_(self.out.weight, self.out.bias, width, config.fmb_embeddings * dim, config.initializer)

    def forward(self, x: Tensor) -> Tensor:
        # X (X^T Y) is O(n k D), (X X^T) Y is O(n^2 (k + D)).
        interactions = torch.bmm(x, self.projection(x).transpose(1, 2))
        return self.out(self.layers(self.norm(interactions.flatten(1)))).unflatten(1, (-1, self.dim))

    def flops(self) -> Flops:
        values = self.norm.weight.numel()
        fm = self.projection.flops(self.dim) + Flops(matmul=2 * values * self.dim)
        norm = Flops(elementwise=LAYER_NORM_FLOPS * values)
        return fm + norm + self.layers.flops() + dense_flops(self.out.in_features, self.out.out_features)


class WukongLayer(nn.Module):
    """Computes ``LN(concat(FMB(X), LCB(X)) + X)``: (B, n, D) -> (B, n_F + n_L, D).

    The residual is projected by a linear combination of embeddings where n is not n_F + n_L. LayerNorm is over the
    dims of each embedding, with one scale and shift for all of them.
    """

    def __init__(self, rows: int, dim: int, config: WukongConfig) -> None:
        super().__init__()
        rows_out = config.fmb_embeddings + config.lcb_embeddings
        self.rows_out, self.dim = rows_out, dim
        self.fmb = FactorizationMachineBlock(rows, dim, config)
        self.lcb = RowMix(rows, config.lcb_embeddings, config.initializer)
        self.residual = RowMix(rows, rows_out, config.initializer) if rows != rows_out else None
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((self.fmb(x), self.lcb(x)), 1)
        return self.norm(y + (x if self.residual is None else self.residual(x)))

    def flops(self) -> Flops:
        residual = self.residual.flops(self.dim) if self.residual is not None else Flops()
        add_and_norm = Flops(elementwise=(1 + LAYER_NORM_FLOPS) * self.rows_out * self.dim)
        return self.fmb.flops() + self.lcb.flops(self.dim) + residual + add_and_norm


class Wukong(OverArch):
    """Computes Wukong: (B, F*D) -> (B, hidden[-1]), or (B, (n_F + n_L) * D) without hidden layers.

    Raises:
        UserError: the fields differ in dim.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: WukongConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or WukongConfig()
        self.dim = equal_dim(self, "Wukong")
        rows_out = config.fmb_embeddings + config.lcb_embeddings
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.layers = nn.Sequential(
            *(WukongLayer(num_fields if i == 0 else rows_out, self.dim, config) for i in range(config.num_layers))
        )
        self.out_features = rows_out * self.dim
        self.output_mlp = DenseStack(self.out_features, config.hidden, config.initializer, dropout=config.dropout)
        if config.hidden:
            self.out_features = config.hidden[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        return self.output_mlp(self.layers(x.unflatten(1, (-1, self.dim))).flatten(1))

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        for layer in self.layers:
            total += cast(WukongLayer, layer).flops()
        return total + self.output_mlp.flops()
