"""Says which evaluation is the best one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssr_rec.checkpointing.progress import Tasks
from ssr_rec.config.training import TrainConfig, larger_is_better

logger = logging.getLogger(__name__)


def monitored(tasks: Tasks, config: TrainConfig) -> float:
    """Return the figure early stopping watches, larger is better: the mean over the tasks that count.

    Those are ``monitor_task``, else all of a weight above 0; of them, those whose figure is defined on the fold.
    A product of ``entire_space`` has the weight of its label.
    """
    values = [tasks[name][config.monitor] for name in counted(tasks, config)]
    values = [value for value in values if not math.isnan(value)]
    if not values:  # any figure is better
        return -math.inf
    value = sum(values) / len(values)
    return value if larger_is_better(config.monitor) else -value


def is_better(tasks: Tasks, best: Mapping[str, Any], config: TrainConfig) -> bool:
    """Return whether an evaluation is better than the best row so far, {}: none, or that one's figure not defined."""
    before = monitored(best["tasks"], config) if best else -math.inf
    return before == -math.inf or monitored(tasks, config) > before


def counted(tasks: Tasks, config: TrainConfig) -> list[str]:
    """Return the tasks whose figures choose the best: those of ``choosing`` that have the figure."""
    if config.monitor_task is not None:
        return [config.monitor_task]
    return [name for name in choosing(list(tasks), config) if config.monitor in tasks[name]]


def choosing(tasks: Sequence[str], config: TrainConfig) -> list[str]:
    """Return the tasks that may choose the best: ``monitor_task``, else all of a weight above 0."""
    if config.monitor_task is not None:
        return [config.monitor_task]
    weights = config.task_weights | {
        f"{before}*{label}": config.task_weights.get(label, 1.0) for label, before in config.entire_space.items()
    }
    return [name for name in tasks if weights.get(name, 1.0) > 0]


def say_what_cannot_choose(tasks: Tasks, config: TrainConfig) -> None:
    """Say which labels have no figure on the validation fold, such as a rare one of which it has no row."""
    chosen_by = counted(tasks, config)
    without = [name for name in chosen_by if math.isnan(tasks[name][config.monitor])]
    if without:
        some = len(without) < len(chosen_by)
        logger.warning(
            f"the validation fold gives no {config.monitor} for {', '.join(without)} (rows of one class?), so that "
            + ("they do not count in choosing the best" if some else "no evaluation is the best: the last is kept")
            + "; name another label by train.monitor_task, or monitor logloss"
        )
