"""Sets learning rates by the step: a warm-up, then what the config of the dense part and of the tables says."""

from __future__ import annotations

import math

from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.config.run import RunConfig
from ssr_rec.config.schedule import ScheduleConfig

TABLES = ("fused", "tables")
"""The parts of ``build_optimizer`` that move embeddings."""


def factor(config: ScheduleConfig, step: int) -> float:
    """Return the factor of the base rate after ``step`` steps without warm-up (from 0), as torch's schedulers have it.

    ``LinearLR``, ``CosineAnnealingLR``, ``PolynomialLR`` and ``StepLR``; unlike theirs it depends on nothing but the
    step, so that a resumed run needs no more than its number.
    """
    if config.name == "constant" or config.steps is None:
        return 1.0
    if config.name == "step":
        return config.factor ** (step // config.steps)
    left = 1 - min(1.0, step / config.steps)
    if config.name == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    elif config.name == "polynomial":
        left = left**config.power
    return config.end + (1 - config.end) * left


class Schedule:
    """Raises every learning rate of an optimizer linearly at first (warm-up), then lets it fall by its schedule.

    The fused optimizer hands its group's rate to FBGEMM at ``zero_grad`` and ``step``, so setting groups is enough.

    Args:
        steps_before: of earlier runs, whose optimizer state this one goes on with.
    """

    def __init__(self, optimizer: CombinedOptimizer, config: RunConfig, steps_before: int = 0) -> None:
        # The dense part comes last.
        self.groups = [
            (group, group["lr"], config.embeddings.schedule if name in TABLES else config.optimizer.schedule)
            for name, part in optimizer.optimizers
            for group in part.param_groups
        ]
        self.warmup_steps, self.steps_before = config.optimizer.warmup_steps, steps_before

    def set(self, step: int) -> None:
        """Set the rates of the update number ``step`` (from 0)."""
        for group, base, config in self.groups:
            group["lr"] = base * self._factor(config, step)

    def rate(self, step: int) -> float:
        """Return what ``set`` gives the dense part."""
        _, base, config = self.groups[-1]
        return base * self._factor(config, step)

    def _factor(self, config: ScheduleConfig, step: int) -> float:
        done = self.steps_before + step
        warm = min(1.0, (done + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * factor(config, max(0, done - self.warmup_steps))
