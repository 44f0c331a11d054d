"""Defines the settings of a task's loss, told apart by ``name``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ssr_rec.common.own_classes import OWN_CLASS
from ssr_rec.common.settings import Settings


class LossSettings(Settings):
    """Defines what the config of every loss has."""

    name: str


class CrossEntropyConfig(LossSettings):
    """Configures binary cross-entropy."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="s: the labels 0 and 1 count as s/2 and 1 - s/2 (Szegedy et al. 2016)"
    )


class FocalConfig(LossSettings):
    """Configures the focal loss (Lin et al. 2017)."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0, description="how little well predicted rows count; 0: as in cross-entropy")
    alpha: float | None = Field(0.25, gt=0, lt=1, description="weight of positive rows, 1 - it of others; None: 1")


class MSEConfig(LossSettings):
    """Configures the squared error, in units of the label's variance in training."""

    name: Literal["mse"] = "mse"


class LogNormalConfig(LossSettings):
    """Configures the squared error of log(1 + y), with predictions of the mean of y."""

    name: Literal["log_normal"] = "log_normal"


class RankingLossSettings(LossSettings):
    """Defines what the config of every loss within groups has."""

    cross_entropy: float = Field(
        0.5, ge=0, lt=1, description="share of cross-entropy in the loss; 0: scores that are no probabilities"
    )


class SoftmaxConfig(RankingLossSettings):
    """Configures the softmax loss within the groups of ``together`` (Bruch et al. 2019)."""

    name: Literal["softmax"] = "softmax"


class PairwiseConfig(RankingLossSettings):
    """Configures the logistic loss of pairs within the groups of ``together`` (Burges et al. 2005)."""

    name: Literal["pairwise"] = "pairwise"


class CustomLossConfig(LossSettings):
    """Names a loss from outside this package by its import path."""

    name: Literal["custom"] = "custom"
    path: str = Field(pattern=OWN_CLASS, description="MODULE:CLASS, a subclass of ssr_rec.model.losses.TaskLoss")
    settings: dict[str, Any] = Field({}, description="that class's own settings, checked by its settings_class")


def _named(value: Any) -> Any:
    """Return the settings that a bare name or import path stands for."""
    if not isinstance(value, str):
        return value
    return {"name": "custom", "path": value} if ":" in value else {"name": value}


LossConfig = Annotated[
    CrossEntropyConfig | FocalConfig | SoftmaxConfig | PairwiseConfig | MSEConfig | LogNormalConfig | CustomLossConfig,
    Field(discriminator="name"),
]
"""Any loss's config; ``name`` says which."""
NamedLoss = Annotated[LossConfig, BeforeValidator(_named)]
"""The same, or its name alone, or ``MODULE:CLASS``."""


def trained_to_rank(losses: Mapping[str, LossSettings]) -> list[str]:
    """Return the tasks whose loss has no share of cross-entropy, so that their scores are no probabilities."""
    return [task for task, loss in losses.items() if isinstance(loss, RankingLossSettings) and loss.cross_entropy == 0]
