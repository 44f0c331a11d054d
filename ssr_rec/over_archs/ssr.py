"""SSR: explicit sparsity for scalable recommendation. Filter each view, then fuse it densely, layer on layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssr_rec.kernels import gather_views, view_fusion
from ssr_rec.over_archs.base import GELU_FLOPS, Flops, OverArch, OverArchSettings
from ssr_rec.over_archs.filters import FILTERS, FilterName, StaticRandomFilter
from ssr_rec.over_archs.layers import (
    LAYER_NORM_EPS,
    DenseStack,
    Dropout,
    Initializer,
    InputNormKind,
    ViewLayerNorm,
    ViewLinear,
    make_input_norm,
)


class SSRConfig(OverArchSettings):
    """SSR-S (``filter: static``) and SSR-D (``filter: dynamic``).

    The defaults are the paper's text (eq. 3-11). Keys marked "released" switch to what the authors'
    code does instead; docs/over_archs.md lists them with their sources.
    """

    name: Literal["ssr"] = "ssr"
    filter: FilterName = Field(
        default="static",
        description="static: SSR-S, eq. 3; dynamic: SSR-D, eq. 4; topk, none, dropout: the ablations of Table 4",
    )
    num_views: int = Field(default=8, ge=1, description="views per layer (b in the paper)")
    view_dim: int = Field(default=128, ge=1, description="dims per view (d_v); a layer's output has views * dims")
    num_layers: int = Field(default=2, ge=1, description="layers (L), each fed with the output of the one before")

    index_seed: int = Field(default=0, ge=0, description="static: seed of each view's dims, apart from the run's")

    iterations: int = Field(default=5, ge=1, description="dynamic: ICS steps (T)")
    alpha_init: float = Field(default=0.1, description="dynamic: start of the extinction rates, one per view and step")
    learn_alpha: bool = Field(default=True, description="dynamic: train the extinction rates; false keeps alpha_init")
    gamma: bool = Field(default=True, description="dynamic: signal recovery, one trained scale per view and dim")
    gate: bool = Field(default=False, description="dynamic, released: multiply ICS by a second linear projection")

    top_k: int = Field(default=16, ge=1, description="topk: dims of a view that stay, by straight-through top-k")
    filter_dropout: float = Field(default=0.5, gt=0.0, lt=1.0, description="dropout: share of the input a view loses")

    fusion_layers: Literal[1, 2] = Field(default=1, description="dense + GELU layers per view; released SSR-S has 2")
    residual: bool = Field(default=False, description="released: add the fusion's input before LayerNorm")
    fusion_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="released: share dropped after the fusion")
    layer_norm_eps: float = Field(
        default=LAYER_NORM_EPS,
        gt=0.0,
        description="added to each view's variance; released: 1e-6 in SSR-D, 1e-3 in SSR-S",
    )

    input_norm: InputNormKind = Field(
        default="none", description="released: batch norm of the input, across_fields in SSR-D, per_field in SSR-S"
    )
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of input dims dropped")
    output: Literal["concat", "mean"] = Field(
        default="concat", description="views of the last layer: concatenated (eq. 6), or averaged (released)"
    )
    output_mlp: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="widths of ReLU layers after the views; released SSR-S has [64]"
    )
    initializer: Initializer = Field(
        default="glorot", description="glorot: as released, zero biases; torch: what nn.Linear would do"
    )

    @model_validator(mode="after")
    def _settings_of_another_filter_are_errors(self) -> SSRConfig:
        used = FILTERS[self.filter].SETTINGS
        for other, cls in FILTERS.items():
            for key in cls.SETTINGS:
                value, default = getattr(self, key), SSRConfig.model_fields[key].default
                if key not in used and value != default:
                    raise ValueError(
                        f"{key}={value} has no effect with filter={self.filter!r}: remove it, or set filter={other!r}"
                    )
        if self.filter == "topk" and self.top_k > self.view_dim:
            raise ValueError(f"top_k={self.top_k} is more than a view has: set it to at most view_dim={self.view_dim}")
        if self.residual and self.filter in ("none", "dropout"):
            raise ValueError(
                f"residual=True adds a view's input, which with filter={self.filter!r} is as wide as the layer's: "
                "remove it, or choose another filter"
            )
        return self

    @property
    def label(self) -> str:
        """As the paper's tables name it, with views x dims x layers."""
        kinds = {
            "static": "SSR-S",
            "dynamic": "SSR-D",
            "topk": f"SSR top-{self.top_k}",
            "none": "SSR without filter",
            "dropout": f"SSR dropout {self.filter_dropout:g}",
        }
        return f"{kinds[self.filter]} {self.num_views}x{self.view_dim}x{self.num_layers}"


class ViewFusion(nn.Module):
    """Dense fusion within each view: ``LN(gelu(h V + c))``, eq. 5 and 6, with the released code's variants.

    With ``residual``, ``LN(h + dropout(gelu(h V + c)))``; with ``fusion_layers=2``,
    ``gelu(gelu(h V1 + c1) V2 + c2)`` instead of one dense layer.
    """

    def __init__(self, fan_in: int, config: SSRConfig) -> None:
        super().__init__()
        views, dim = config.num_views, config.view_dim
        self.dense = ViewLinear(views, fan_in, dim, config.initializer)
        self.dense2 = ViewLinear(views, dim, dim, config.initializer) if config.fusion_layers == 2 else None
        self.dropout = Dropout(config.fusion_dropout)
        self.norm = ViewLayerNorm(views, dim, config.layer_norm_eps)
        self.residual = config.residual

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """(B, V, fan_in), or (B, width) with the dims (V, fan_in) that the views see, to (B, V, d)."""
        residual = None
        if self.residual:
            residual = x = x if indices is None else gather_views(x, indices)
            indices = None
        if self.dense2 is not None:
            x, indices = view_fusion(x, indices, self.dense.weight, self.dense.bias), None
        last = self.dense if self.dense2 is None else self.dense2
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        if not (self.training and self.dropout.p):
            return view_fusion(x, indices, last.weight, last.bias, residual, *norm)
        kept = self.dropout.draw((x.shape[0], *self.norm.weight.shape), x.device)
        return view_fusion(x, indices, last.weight, last.bias, residual, *norm, *kept)

    def flops(self) -> Flops:
        dims = self.norm.weight.numel()
        one_dense = self.dense.flops() + Flops(elementwise=GELU_FLOPS * dims)
        total = one_dense
        if self.dense2 is not None:
            total += self.dense2.flops() + Flops(elementwise=GELU_FLOPS * dims)
        return total + self.norm.flops() + Flops(elementwise=dims if self.residual else 0)


class SSRLayer(nn.Module):
    """Filter, then fuse: (B, width) -> (B, V, d)."""

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__()
        self.filter = FILTERS[config.filter](width, layer, config)
        self.fusion = ViewFusion(self.filter.out_dim, config)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.filter, StaticRandomFilter):
            return self.fusion(x, self.filter.indices)
        return self.fusion(self.filter(x))

    def flops(self) -> Flops:
        return self.filter.flops() + self.fusion.flops()


class SSR(OverArch):
    """SSR-S and SSR-D: one block, two filters (paper, section 2).

    (B, F*D) -> (B, V*d); (B, d) with ``output='mean'``; (B, output_mlp[-1]) with an output MLP.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: SSRConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or SSRConfig()
        wide = config.num_views * config.view_dim
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.input_dropout = Dropout(config.input_dropout)
        self.layers = nn.ModuleList(
            SSRLayer(self.in_features if i == 0 else wide, i, config) for i in range(config.num_layers)
        )
        self.out_features = wide if config.output == "concat" else config.view_dim
        self.output_mlp = DenseStack(self.out_features, config.output_mlp, config.initializer)
        if config.output_mlp:
            self.out_features = config.output_mlp[-1]

    def blocks(self) -> list[SSRLayer]:
        """The layers, first to last."""
        return [cast(SSRLayer, layer) for layer in self.layers]

    def prepare(self, x: Tensor) -> Tensor:
        """What the first layer sees of the input: (B, F*D) -> (B, F*D)."""
        x = self.input_norm(x)
        return self.input_dropout(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepare(x)
        for layer in self.layers[:-1]:
            x = layer(x).flatten(1)
        views = self.layers[-1](x)
        return self.output_mlp(views.mean(1) if self.config.output == "mean" else views.flatten(1))

    def statistics(self, x: Tensor, field_names: Sequence[str]) -> dict[str, Any]:
        return {"filters": ssr_statistics(self, x)}

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        for layer in self.blocks():
            total += layer.flops()
        if self.config.output == "mean":
            total += Flops(elementwise=self.config.num_views * self.config.view_dim)
        return total + self.output_mlp.flops()


@torch.no_grad()
def ssr_statistics(ssr: SSR, x: Tensor) -> dict[str, Any]:
    """What each layer's filter does on the batch x (B, F*D), as JSON values; the model is left as it was.

    SSR-D: the share of exact zeros after ICS, overall and per view, and the (V, T) alphas with the
    number of negative ones. SSR-S: the share of the layer's input dims that any view sees.
    """
    modes = {module: module.training for module in ssr.modules()}
    ssr.eval()
    try:
        layers, x = [], ssr.prepare(x)
        for layer in ssr.blocks():
            layers.append(layer.filter.statistics(x))
            x = layer(x).flatten(1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {"filter": ssr.config.filter, "layers": layers}
