"""Defines the ``dense`` section of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings, Widths


class DenseConfig(Settings):
    """Sets how the dense columns of a dataset, raw numbers, become fields of the input vector."""

    encoding: Literal["scaled", "piecewise"] = Field(
        "scaled",
        description="scaled: one number, as the spec scales it; piecewise: how far it is through each of its quantile "
        "bins; both with a mark of missing ones",
    )
    arch: Literal["mlp", "linear"] = Field(
        "mlp", description="mlp: all columns to one field, or to more; linear: each column to a field of its own"
    )
    hidden: Widths = Field([64], description="mlp: widths of the ReLU layers before the linear one to the fields")
    fields: int = Field(1, ge=1, description="mlp: fields that it makes, each of embeddings.dim")

    @model_validator(mode="after")
    def _settings_without_effect_are_errors(self) -> DenseConfig:
        for key in ("hidden", "fields"):
            value = getattr(self, key)
            if self.arch == "linear" and value != DenseConfig.model_fields[key].default:
                raise UserError(f"{key}={value} has no effect with arch=linear: remove it, or set arch=mlp")
        return self
