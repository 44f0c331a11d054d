"""Defines the ``train`` section of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import OWN_CLASS
from ssr_rec.common.settings import Settings
from ssr_rec.config.losses import NamedLoss
from ssr_rec.config.ranking import RankingMeasure, is_ranking

LARGER_IS_BETTER = ("auc", "gauc", "xauc")
"""Of what ``monitor`` may name, with the measures of rankings; the others are errors."""
OF_NUMBERS = ("rmse", "mae", "xauc")
"""Measures of labels that are numbers alone."""


class TrainConfig(Settings):
    batch_size: int = Field(1024, ge=1, description="rows of a global batch, over all ranks")
    eval_batch_size: int = Field(8192, ge=1, description="rows of a global batch in evaluation")
    epochs: int = Field(1, ge=1, description="at most this many passes over the training split")
    max_steps: int | None = Field(None, ge=1, description="at most this many steps; None: epochs alone decide")
    eval_every: int | None = Field(500, ge=1, description="steps between evaluations; None: one after each epoch")
    metrics: Literal["auto", "exact", "bounded"] = Field(
        "auto", description="exact keeps every prediction; bounded does not grow, with error bounds; auto: by the rows"
    )
    metrics_rows: int = Field(
        2**22, ge=1, description="rows of a fold up to which auto is exact, and that bounded keeps for GAUC"
    )
    metrics_by: str | None = Field(
        None, description="feature with one value a row, by each of which evaluations give metrics too; None: domain"
    )
    monitor: Literal["auc", "gauc", "logloss", "ne", "rmse", "mae", "xauc"] | RankingMeasure = Field(
        "auc",
        description="validation metric that picks the best; rmse, mae, xauc: of labels that are numbers; also one of "
        "ranking_metrics",
    )
    ranking_metrics: list[RankingMeasure] = Field(
        [], description="ndcg@K, mrr, hit@K: also measured in the groups of together, else in those of the group id"
    )
    extra_metrics: list[Annotated[str, Field(pattern=OWN_CLASS)]] = Field(
        [], description="MODULE:FUNCTION of (scores, labels, weights, groups) to a number, also measured on each fold"
    )
    monitor_task: str | None = Field(None, description="label whose metric counts; None: mean over the labels")
    patience: int | None = Field(None, ge=1, description="evaluations without a better one before stopping")
    task_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="label -> weight of its loss; 1 for those not named; 0: evaluated, not trained"
    )
    task_weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed", description="uncertainty: also weigh each task's loss by a learned variance (Kendall et al. 2018)"
    )
    losses: dict[str, NamedLoss] = Field(
        {},
        description="label -> its loss: a name, MODULE:CLASS, or settings with a name; without it cross_entropy or mse",
    )
    entire_space: dict[str, str] = Field(
        {},
        description="label -> label that it follows, as pay: click; trained by the product of their probabilities "
        "on all rows (ESMM), though it is observed on rows of the other alone",
    )
    pipeline: Literal["sparse_dist", "prefetch"] = Field(
        "sparse_dist", description="prefetch: also fetch cached rows of fused_uvm_caching tables ahead; CUDA only"
    )
    accumulate: int = Field(
        1, ge=1, description="batches for one update of the over-arch and heads; every batch updates the tables"
    )
    tf32: bool = Field(False, description="matrix products of the over-arch in TF32, on GPUs from A100 on")
    bf16: bool = Field(False, description="over-arch and heads in bfloat16 by autocast; tables stay float32")
    log_every: int = Field(50, ge=1, description="steps between progress rows")
    max_loss: float | None = Field(10.0, gt=0, description="nats per row above which training has exploded; None: any")
    skip_bad_steps: int = Field(
        0, ge=0, description="leave out up to so many steps whose loss is not finite or above max_loss; 0: stop at one"
    )
    stall_timeout_s: float | None = Field(
        900.0, gt=0, description="seconds without progress after which a stalled rank ends the job; None: wait"
    )

    @model_validator(mode="after")
    def _monitored_is_measured(self) -> TrainConfig:
        if is_ranking(self.monitor) and self.monitor not in self.ranking_metrics:
            raise UserError(f"monitor: {self.monitor} is not measured; add it to train.ranking_metrics")
        return self

    def measured(self, labels: Sequence[str]) -> list[str]:
        """Return what evaluations measure: the labels, then the products of ``entire_space``, as ``click*pay``."""
        return [*labels, *(f"{before}*{label}" for label, before in self.entire_space.items())]


def larger_is_better(measure: str) -> bool:
    """Return whether a larger figure of what ``monitor`` may name is the better one."""
    return measure in LARGER_IS_BETTER or is_ranking(measure)
