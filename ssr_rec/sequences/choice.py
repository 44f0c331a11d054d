"""Defines the ``encoder`` of a sequence in a config: any encoder's settings, told apart by ``name``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssr_rec.sequences.settings import (
    CustomEncoderConfig,
    DINConfig,
    HSTUConfig,
    PoolConfig,
    TargetAttentionConfig,
    TransformerConfig,
)

EncoderConfig = Annotated[
    PoolConfig | DINConfig | TargetAttentionConfig | TransformerConfig | HSTUConfig | CustomEncoderConfig,
    Field(discriminator="name"),
]
"""Any encoder's config; ``name`` says which."""
