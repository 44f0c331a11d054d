"""AutoInt runs multi-head self-attention over the fields (Song et al., CIKM 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.over_archs.base import LAYER_NORM_FLOPS, SOFTMAX_FLOPS, Flops, OverArch, dense_flops, equal_dim
from ssr_rec.over_archs.layers import DenseStack, Dropout, init_dense_, make_input_norm
from ssr_rec.over_archs.settings import (
    LAYER_NORM_EPS,
    AutoIntConfig,
)


class InteractingLayer(nn.Module):
    """Every field attends to every field, per head (eq. 5-8): (B, F, dim) -> (B, F, heads * attention_dim).

    With one weight for all projections: its rows are the queries of head 1, 2, .., the keys, the values and, with a
    residual, W_Res.
    """

    def __init__(self, num_fields: int, dim: int, config: AutoIntConfig) -> None:
        super().__init__()
        self.num_fields, self.num_heads, self.residual = num_fields, config.num_heads, config.residual
        self.width = config.num_heads * config.attention_dim
        self.score_scale = config.attention_dim**-0.5 if config.scale else None
        self.project = nn.Linear(dim, (4 if config.residual else 3) * self.width, bias=False)
        init_dense_(self.project.weight, None, dim, self.width, config.initializer)
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(self.width, eps=LAYER_NORM_EPS) if config.layer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values, *skip = self.project(x).split(self.width, dim=2)
        if self.score_scale is not None:
            queries = queries * self.score_scale
        scores = self._heads(queries) @ self._heads(keys).transpose(2, 3)
        weights = self.dropout(torch.softmax(scores, 3))
        y = (weights @ self._heads(values)).transpose(1, 2).flatten(2)
        y = F.relu(y + skip[0] if self.residual else y)
        return y if self.norm is None else self.norm(y)

    def _heads(self, x: Tensor) -> Tensor:
        """Map (B, F, heads * d) to (B, heads, F, d)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def flops(self) -> Flops:
        pairs, outputs = self.num_fields**2, self.num_fields * self.width
        project = dense_flops(self.project.in_features, self.project.out_features, bias=False)
        per_output = 1 + self.residual + (self.score_scale is not None) + LAYER_NORM_FLOPS * (self.norm is not None)
        return Flops(
            matmul=self.num_fields * project.matmul + 2 * 2 * pairs * self.width,
            elementwise=SOFTMAX_FLOPS * pairs * self.num_heads + per_output * outputs,
        )


class AutoInt(OverArch):
    """Stacks interacting layers and concatenates all fields of the last one; AutoInt+ adds the features of a DNN (5.5).

    (B, F*D) -> (B, F * heads * attention_dim + deep_hidden[-1]), attention first.

    Raises:
        UserError: the fields' dims differ.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: AutoIntConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or AutoIntConfig()
        dim, width = equal_dim(self, "AutoInt"), config.num_heads * config.attention_dim
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.layers = nn.ModuleList(
            InteractingLayer(num_fields, dim if i == 0 else width, config) for i in range(config.num_layers)
        )
        self.deep = DenseStack(self.in_features, config.deep_hidden, config.initializer, dropout=config.dropout)
        self.out_features = num_fields * width + (config.deep_hidden[-1] if config.deep_hidden else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        y = x.unflatten(1, (len(self.field_dims), -1))
        for layer in self.layers:
            y = layer(y)
        y = y.flatten(1)
        return torch.cat([y, self.deep(x)], 1) if self.config.deep_hidden else y

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        for layer in self.layers:
            total += cast(InteractingLayer, layer).flops()
        return total + self.deep.flops()
