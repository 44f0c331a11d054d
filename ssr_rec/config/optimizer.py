"""Defines the ``optimizer`` section of a config, for the dense part of the model."""

from __future__ import annotations

from pydantic import Field

from ssr_rec.common.settings import Settings


class DenseOptimizerConfig(Settings):
    """Configures Adam for the over-arch and the heads."""

    learning_rate: float = Field(1e-3, ge=0)
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled (AdamW), on weights alone: no bias, norm, alpha or gamma"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest L2 norm of the over-arch's gradient; None: no clipping"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps over which dense and sparse learning rates rise from 0, linearly"
    )
