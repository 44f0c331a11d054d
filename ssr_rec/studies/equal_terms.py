"""Refuses comparisons whose runs would be judged by different figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig
from ssr_rec.config.training import OF_NUMBERS
from ssr_rec.data.schema import Schema
from ssr_rec.training.monitor import choosing

LENGTHS = ("train.max_steps", "train.batch_size", "train.epochs")
"""Keys that decide which day ``train.max_steps`` ends on."""


def judging_tasks(config: RunConfig, schema: Schema) -> list[str]:
    """Return the tasks whose figures choose among runs on a dataset."""
    monitor, wanted = config.train.monitor, config.train.measured(config.data.labels or schema.labels)
    having = [task for task in wanted if (schema.number(task) is not None) == (monitor in OF_NUMBERS)]
    return choosing(having, config.train)


def check_equal_terms(planned: Mapping[str, Sequence[RunConfig]], schema: Schema, where: str | Path) -> None:
    """Refuse systems that would be judged by different figures, and trials of one system that would be.

    Args:
        planned: system -> the configs of its trials.
        schema: the dataset's.

    Raises:
        UserError: names the key.
    """
    every = [config for trials in planned.values() for config in trials]
    keys = ["data.labels", "data.days", "train.monitor", "train.monitor_task"]
    if any(config.data.days is not None and config.train.max_steps is not None for config in every):
        keys += LENGTHS
    for key in keys:
        section, name = key.split(".")
        judged = dict.fromkeys(str(getattr(getattr(config, section), name)) for config in every)
        if len(judged) > 1:
            why = ", since train.max_steps then ends on one day" if key in LENGTHS else ""
            raise UserError(f"{where}: {key} must be the same in all runs{why}; it is {', '.join(judged)}")
    for system, trials in planned.items():
        tasks = dict.fromkeys(" and ".join(judging_tasks(config, schema)) for config in trials)
        if len(tasks) > 1:
            raise UserError(
                f"{where}: system {system!r}: the best of its trials would be chosen by {trials[0].train.monitor} of "
                f"{', or of '.join(tasks)}; set train.monitor_task"
            )
