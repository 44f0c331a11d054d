"""Defines the ``track`` section of a config."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings


def _without_password(uri: str) -> str:
    if urlsplit(uri).password is not None:
        raise UserError(
            "must not hold a password, as a run's config is saved and sent; use MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or leave it out and set MLFLOW_TRACKING_URI"
        )
    return uri


class TrackConfig(Settings):
    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        ["tensorboard"], description="who gets params, metrics and artifacts of a run, besides its folder"
    )
    project: str = Field("ssr_rec", min_length=1, description="experiment of MLflow, project of Weights & Biases")
    mlflow_uri: Annotated[str, AfterValidator(_without_password)] | None = Field(
        None,
        description="MLflow's server or store, such as http://host:5000 or sqlite:///mlflow.db; None: MLflow's own",
    )
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="offline: write to the run folder, for wandb sync; online needs WANDB_API_KEY"
    )
