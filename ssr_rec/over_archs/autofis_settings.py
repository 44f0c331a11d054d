"""Defines the settings of AutoFIS and of its gates' optimizer, importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Share, Widths
from ssr_rec.over_archs.settings import Initializer, InputNormKind, OverArchSettings, sizes

GRDA_KEYS = ("grda_lr", "grda_c", "grda_mu")


# Not strict, because a pair is a list in YAML; its indices are still strict integers.
Pair = Annotated[tuple[int, int], Field(strict=False)]


LEARNING_RATE, C, MU = 1.0, 5e-4, 0.8
"""The released AutoDeepFM run: ``learning_rate2``, ``grda_c``, ``grda_mu``."""


class AutoFISConfig(OverArchSettings):
    """Configures AutoDeepFM. ``pairs`` decides the stage: without it the search, with it the model of these pairs."""

    name: Literal["autofis"] = "autofis"
    pairs: list[Pair] | None = Field(
        default=None, description="pairs i < j of field indices to keep, from 0; None: search among all of them"
    )
    grda_lr: float = Field(default=LEARNING_RATE, gt=0.0, description="search: learning rate of the gates")
    grda_c: float = Field(default=C, ge=0.0, description="search: strength of the gates' threshold; 0 closes none")
    grda_mu: float = Field(
        default=MU, gt=0.0, lt=1.0, description="search: the gates' threshold grows with step^grda_mu"
    )
    alpha_init: float = Field(default=0.6, gt=0.0, description="start of every pair's weight, in both stages")
    hidden: Widths = Field(default=[320, 320, 320], min_length=1, description="deep: width of each ReLU layer")
    layer_norm: bool = Field(default=False, description="deep: LayerNorm between each dense layer and its ReLU")
    dropout: Share = Field(default=0.0, description="deep: share dropped after each layer")
    input_norm: InputNormKind = Field(
        default="none", description="deep: batch norm of its input, per dim, per field or per dim across fields"
    )
    initializer: Initializer = Field(
        default="glorot", description="deep: Glorot uniform and zero bias, or (torch) nn.Linear's own"
    )

    @model_validator(mode="after")
    def _pairs_are_distinct_pairs(self) -> AutoFISConfig:
        seen = set()
        for i, j in self.pairs or []:
            if not 0 <= i < j:
                raise UserError(f"pairs has [{i}, {j}]: a pair is two field indices i < j, counted from 0")
            if (i, j) in seen:
                raise UserError(f"pairs has [{i}, {j}] twice: remove one")
            seen.add((i, j))
        return self

    @model_validator(mode="after")
    def _search_settings_need_a_search(self) -> AutoFISConfig:
        for key in GRDA_KEYS if self.pairs is not None else ():
            value = getattr(self, key)
            if value != AutoFISConfig.model_fields[key].default:
                raise UserError(f"{key}={value} has no effect with pairs: remove it, or remove pairs to search")
        return self

    @property
    def label(self) -> str:
        """Return the stage, and depth x width of the deep part or every width where they differ."""
        stage = "search" if self.pairs is None else f"{len(self.pairs)} pairs"
        return f"AutoFIS {stage} {sizes(self.hidden)}"
