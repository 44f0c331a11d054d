"""Defines the ``over_arch`` section of a config: any over-arch's settings, told apart by ``name``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssr_rec.over_archs.autofis_settings import AutoFISConfig
from ssr_rec.over_archs.settings import (
    AFNConfig,
    AutoIntConfig,
    CustomOverArchConfig,
    DCNv2Config,
    DeepFMConfig,
    MLPConfig,
    MMoEConfig,
    PLEConfig,
    RankMixerConfig,
    WukongConfig,
)
from ssr_rec.over_archs.ssr_settings import SSRConfig

OverArchConfig = Annotated[
    SSRConfig
    | MLPConfig
    | DeepFMConfig
    | DCNv2Config
    | MMoEConfig
    | PLEConfig
    | AutoIntConfig
    | AutoFISConfig
    | AFNConfig
    | WukongConfig
    | RankMixerConfig
    | CustomOverArchConfig,
    Field(discriminator="name"),
]
"""Any over-arch's config; ``name`` says which."""
