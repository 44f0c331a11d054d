"""Defines the ``data`` section of a config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssr_rec.common.settings import Settings
from ssr_rec.data.synthetic.config import SyntheticConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Settings):
    path: str | None = Field(None, description="a folder made by tools/prepare_data.py; None: draw the synthetic log")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="the log to draw when path is None")
    synthetic_root: str = Field("data", description="folder that keeps drawn logs")
    features: list[str] | None = Field(None, description="features and dense columns to use, in this order; None: all")
    labels: list[str] | None = Field(None, description="labels to train, one task each; None: all")
    days: str | None = Field(
        None,
        description="train by days, evaluating each next one before it is trained on: all, FIRST..LAST, FIRST.. or "
        "..LAST; train.epochs are then passes over each day",
    )
    num_lanes: int = Field(
        16, ge=1, le=65_536, description="lanes of data/batch_order.py: up to so many ranks see equal batches"
    )
    oov_dropout: Share | dict[str, Share] = Field(
        0.0,
        description="share of training's lookups, of all features with a vocabulary or by feature, that goes to the "
        "out-of-vocabulary row",
    )
    shuffle: bool = Field(True, description="new order every epoch; false reads the rows as they are stored")
    prefetch: int = Field(4, ge=1, description="batches read ahead in the background")
