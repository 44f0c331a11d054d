"""Runs two stages: a search, and the training of what it found (AutoFIS)."""

from __future__ import annotations

from collections.abc import Callable

from ssr_rec.common.distributed import on_rank_0
from ssr_rec.config.run import RunConfig
from ssr_rec.over_archs.autofis_settings import AutoFISConfig
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.runs.open import finished_report
from ssr_rec.runs.report import Report


def after_search(
    config: RunConfig, train_stage: Callable[[RunConfig], tuple[Report, OverArchConfig | None]]
) -> RunConfig:
    """Return the config to train: this one, or of an over-arch that searches first, what its search has found.

    The search's run folder is named ``NAME-search``; a search that this job has finished is not repeated. Collective.
    """
    if not isinstance(config.over_arch, AutoFISConfig) or config.over_arch.pairs is not None:
        return config
    search = config.model_copy(update={"name": f"{config.name}-search" if config.name else None})
    values, label = search.model_dump(mode="json"), config.over_arch.label
    done = on_rank_0(lambda: finished_report(values, label, of_stage=True))
    following = AutoFISConfig.model_validate(done.following) if done else train_stage(search)[1]
    return config.model_copy(update={"over_arch": following})
