"""Defines the Dense MLP, the globally connected baseline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssr_rec.over_archs.base import Flops, OverArch
from ssr_rec.over_archs.layers import DenseStack, make_input_norm
from ssr_rec.over_archs.settings import MLPConfig


class MLP(OverArch):
    """Runs dense layers over the whole input vector: (B, F*D) -> (B, hidden[-1])."""

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: MLPConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or MLPConfig()
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.layers = DenseStack(
            self.in_features,
            config.hidden,
            config.initializer,
            activation=config.activation,
            layer_norm=config.layer_norm,
            dropout=config.dropout,
        )
        self.out_features = config.hidden[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        return self.layers(x)

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        return total + self.layers.flops()
