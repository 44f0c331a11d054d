"""Dense MLP: the globally connected baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from ssr_rec.over_archs.base import Flops, OverArch, OverArchSettings
from ssr_rec.over_archs.layers import DenseStack, Initializer, InputNormKind, make_input_norm, sizes


class MLPConfig(OverArchSettings):
    """Dense MLP."""

    name: Literal["mlp"] = "mlp"
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default=[320, 320, 320], min_length=1, description="width of each layer; the last one is the output's"
    )
    activation: Literal["relu", "gelu"] = Field(default="relu", description="GELU is the exact one")
    layer_norm: bool = Field(default=False, description="LayerNorm between each dense layer and its activation")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of activations dropped after each layer")
    input_norm: InputNormKind = Field(
        default="none", description="batch norm of the input, per dim, per field or per dim across fields"
    )
    initializer: Initializer = Field(
        default="glorot", description="glorot: Glorot uniform, zero bias; torch: nn.Linear's own"
    )

    @property
    def label(self) -> str:
        """Depth x width, or every width where they differ."""
        return f"Dense MLP {sizes(self.hidden)}"


class MLP(OverArch):
    """Dense layers over the whole input vector: (B, F*D) -> (B, hidden[-1])."""

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
