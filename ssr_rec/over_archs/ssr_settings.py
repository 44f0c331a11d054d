"""Defines the settings of SSR-S, SSR-A and SSR-D, importable without torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Share, Widths
from ssr_rec.over_archs.settings import LAYER_NORM_EPS, Initializer, InputNormKind, OverArchSettings

FilterName = Literal["static", "adaptive", "dynamic", "topk", "none", "dropout"]
FILTER_KEYS: dict[FilterName, tuple[str, ...]] = {
    "static": ("index_seed",),
    "adaptive": ("index_seed", "adapt_every", "adapt_until", "adapt_threshold"),
    "dynamic": ("filter_dim", "iterations", "alpha_init", "learn_alpha", "gamma", "gate"),
    "topk": ("top_k",),
    "none": (),
    "dropout": ("filter_dropout",),
}
"""The keys of SSRConfig that only some filters read."""
WRITTEN_BEFORE: dict[str, Any] = {
    "adapt_every": 100,
    "adapt_until": 300,
    "adapt_batches": 20,
    "adapt_share": 0.1,
    "adapt_spread": 1.0,
    "adapt_threshold": 2.0,
}
"""What configs of runs without SSR-A have of its keys where versions before 2026-12-01 wrote them: it says nothing."""


class SSRConfig(OverArchSettings):
    """Configures SSR-S (``filter: static``), SSR-A (``adaptive``) and SSR-D (``dynamic``).

    The defaults are the paper's text (eq. 3-11). Keys marked "released" switch to what the authors'
    code does instead; docs/over_archs.md lists them with their sources.
    """

    name: Literal["ssr"] = "ssr"
    filter: FilterName = Field(
        default="static",
        description="static: SSR-S, eq. 3; adaptive: SSR-A, which is SSR-S whose dims move while it trains; dynamic: "
        "SSR-D, eq. 4; topk, none, dropout: the ablations of Table 4",
    )
    num_views: int = Field(default=8, ge=1, description="views per layer (b in the paper)")
    view_dim: int = Field(default=128, ge=1, description="dims per view (d_v); a layer's output has views * dims")
    domain_views: int = Field(
        default=0, ge=0, description="further views per layer that each value of ``domain`` has of its own, as wide"
    )
    num_layers: int = Field(default=2, ge=1, description="layers (L), each fed with the output of the one before")

    index_seed: int = Field(
        default=0, ge=0, description="static, adaptive: seed of each view's dims, apart from the run's"
    )

    adapt_every: int = Field(
        default=100,
        ge=1,
        description="adaptive: steps from one exchange of dims to the next, the first after twice that",
    )
    adapt_until: int = Field(default=500, ge=1, description="adaptive: the last step after which dims are exchanged")
    adapt_threshold: float = Field(
        default=1.0,
        ge=0.0,
        description="adaptive: dims go of a field without which the loss would be so many standard errors lower",
    )

    filter_dim: int | None = Field(
        default=None, ge=1, description="dynamic: dims a view is projected to (d_v* of section 2.2); null: view_dim"
    )
    iterations: int = Field(default=5, ge=1, description="dynamic: ICS steps (T)")
    alpha_init: float = Field(default=0.1, description="dynamic: start of the extinction rates, one per view and step")
    learn_alpha: bool = Field(default=True, description="dynamic: train the extinction rates; false keeps alpha_init")
    gamma: bool = Field(default=True, description="dynamic: signal recovery, one trained scale per view and dim")
    gate: bool = Field(default=False, description="dynamic, released: multiply ICS by a second linear projection")

    top_k: int = Field(default=16, ge=1, description="topk: dims of a view that stay, by straight-through top-k")
    filter_dropout: float = Field(default=0.5, gt=0.0, lt=1.0, description="dropout: share of the input a view loses")

    fusion_layers: Literal[1, 2] = Field(default=1, description="dense + GELU layers per view; released SSR-S has 2")
    residual: bool = Field(default=False, description="released: add the fusion's input before LayerNorm")
    fusion_dropout: Share = Field(default=0.0, description="released: share dropped after the fusion")
    layer_norm_eps: float = Field(
        default=LAYER_NORM_EPS,
        gt=0.0,
        description="added to each view's variance; released: 1e-6 in SSR-D, 1e-3 in SSR-S",
    )

    input_norm: InputNormKind = Field(
        default="none", description="released: batch norm of the input, across_fields in SSR-D, per_field in SSR-S"
    )
    input_dropout: Share = Field(default=0.0, description="share of input dims dropped")
    output: Literal["concat", "mean"] = Field(
        default="concat", description="views of the last layer: concatenated (eq. 6), or averaged (released)"
    )
    output_mlp: Widths = Field(default=[], description="widths of ReLU layers after the views; released SSR-S has [64]")
    initializer: Initializer = Field(
        default="glorot", description="glorot: as released, zero biases; torch: what nn.Linear would do"
    )

    @model_validator(mode="before")
    @classmethod
    def _what_older_versions_wrote_is_no_error(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("filter") == "adaptive":
            return values
        return {
            key: value for key, value in values.items() if key not in WRITTEN_BEFORE or value != WRITTEN_BEFORE[key]
        }

    @model_serializer(mode="wrap")
    def _without_settings_of_other_filters(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A default of a key that says nothing here may change; a run's config must not become wrong by that.
        others = {key for keys in FILTER_KEYS.values() for key in keys} - {*FILTER_KEYS[self.filter]}
        return {key: value for key, value in serialize(self).items() if key not in others}

    @model_validator(mode="after")
    def _settings_of_another_filter_are_errors(self) -> SSRConfig:
        used = FILTER_KEYS[self.filter]
        for other, keys in FILTER_KEYS.items():
            for key in keys:
                value, default = getattr(self, key), SSRConfig.model_fields[key].default
                if key not in used and value != default:
                    raise UserError(
                        f"{key}={value} has no effect with filter={self.filter!r}: remove it, or set filter={other!r}"
                    )
        if self.domain_views and self.filter not in ("static", "adaptive", "dynamic"):
            raise UserError(
                f"domain_views={self.domain_views} are for the filters static, adaptive and dynamic, not for "
                f"{self.filter!r}: remove one of the two"
            )
        if self.filter == "topk" and self.top_k > self.view_dim:
            raise UserError(f"top_k={self.top_k} is more than a view has: set it to at most view_dim={self.view_dim}")
        if self.filter == "adaptive" and self.input_norm in ("per_dim", "per_field"):
            raise UserError(
                f"input_norm={self.input_norm!r} hides from filter='adaptive' what a field is worth, since the loss "
                "does not change with the field's scale: set input_norm to none or across_fields, or filter='static'"
            )
        if self.filter == "adaptive" and 2 * self.adapt_every > self.adapt_until:
            raise UserError(
                f"adapt_every={self.adapt_every} is above half of adapt_until={self.adapt_until}, so that no dim would "
                "move: lower the one, raise the other, or set filter='static'"
            )
        batches = self.adapt_until - self.adapt_every
        if self.filter == "adaptive" and batches <= self.adapt_threshold**2:
            raise UserError(
                f"adapt_until={self.adapt_until} leaves {batches} batches to look at, whose mean is never more than "
                f"{math.sqrt(batches):.1f} standard errors from 0, so with adapt_threshold={self.adapt_threshold:g} no "
                "dim would move: raise the one, or lower the other"
            )
        if self.residual and self.filter in ("none", "dropout"):
            raise UserError(
                f"residual=True adds a view's input, which with filter={self.filter!r} is as wide as the layer's: "
                "remove it, or choose another filter"
            )
        if self.residual and self.filter_dim not in (None, self.view_dim):
            raise UserError(
                f"residual=True adds a view's input of filter_dim={self.filter_dim} dims to its output of "
                f"view_dim={self.view_dim}: make them equal, or remove one of the two"
            )
        return self

    @property
    def label(self) -> str:
        """Return the paper's name for it, with views x dims x layers."""
        kinds = {
            "static": "SSR-S",
            "adaptive": "SSR-A",
            "dynamic": "SSR-D",
            "topk": f"SSR top-{self.top_k}",
            "none": "SSR without filter",
            "dropout": f"SSR dropout {self.filter_dropout:g}",
        }
        dims = f"{self.filter_dim}-{self.view_dim}" if self.filter_dim is not None else str(self.view_dim)
        views = f"{self.num_views}+{self.domain_views}" if self.domain_views else str(self.num_views)
        return f"{kinds[self.filter]} {views}x{dims}x{self.num_layers}"
