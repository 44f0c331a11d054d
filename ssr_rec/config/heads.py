"""Defines the ``heads`` section of a config."""

from __future__ import annotations

from pydantic import Field

from ssr_rec.common.settings import Settings, Share, Widths


class HeadsConfig(Settings):
    """Sets what follows the over-arch for each task: its tower, then one linear unit."""

    hidden: Widths = Field(
        [], description="widths of the ReLU layers of every task's own tower; none: shared features to linear heads"
    )
    per_domain: bool = Field(
        False, description="add a delta of each value of ``domain`` to the weights of towers and heads, zero at first"
    )
    dropout: Share = Field(0.0, description="share of activations dropped after each tower layer")
