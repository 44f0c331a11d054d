"""Defines the ``optimizer`` section of a config, for the dense part of the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssr_rec.common.settings import Settings
from ssr_rec.config.schedule import ScheduleConfig


class DenseOptimizerConfig(Settings):
    """Configures the optimizer of the dense part: over-arch, heads and encoders of sequences."""

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
    schedule: ScheduleConfig = Field(
        ScheduleConfig(), description="of the dense learning rate after the warm-up; that of tables is their own"
    )
    matrices: Literal["adamw", "muon"] = Field(
        "adamw",
        description="what moves the weight matrices of the over-arch, a view's on its own; muon takes learning_rate "
        "and weight_decay as they are (its updates are scaled to AdamW's), and leaves all else to adamw",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="evaluate, keep and export an average of the dense weights, of which an update leaves this share; "
        "None: the weights themselves",
    )
