"""The ``heads`` section of a config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssr_rec.common.settings import Settings


class HeadsConfig(Settings):
    """What follows the over-arch for each task: its tower, then one linear unit."""

    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="widths of the ReLU layers of every task's own tower; none: shared features to linear heads"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of activations dropped after each tower layer")
