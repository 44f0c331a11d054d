"""Defines the ``sequences`` section of a config."""

from __future__ import annotations

from pydantic import Field

from ssr_rec.common.settings import Settings
from ssr_rec.sequences.choice import EncoderConfig
from ssr_rec.sequences.settings import PoolConfig


class SequenceConfig(Settings):
    """Says how the events of one sequence become fields of the input vector."""

    encoder: EncoderConfig = PoolConfig()
    target: list[str] | None = Field(
        None,
        min_length=1,
        description="single-valued features that the events are seen from, each of a table that the sequence reads; "
        "null: the first of each such table",
    )
