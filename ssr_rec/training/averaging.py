"""Keeps an exponential moving average of the dense weights, and lends it to an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, OptimizerWrapper

AVERAGE = "average"
"""Key of the average in a parameter's optimizer state, where checkpoints and resumed runs find it."""


class Averaging(OptimizerWrapper):
    """Averages the weights after each update: ``average = decay * average + (1 - decay) * weight``, the first a copy.

    That is the arithmetic of torch's ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``. A step that is left out
    leaves the average alone.
    """

    def __init__(self, optimizer: KeyedOptimizer, decay: float) -> None:
        super().__init__(optimizer)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the weights, then their average."""
        super().step(closure)
        averages, weights = [], []
        for parameter in self.params.values():
            state = self.state.get(parameter)
            if not state:  # it has never had a gradient, so it is its own average
                continue
            if AVERAGE not in state:
                state[AVERAGE] = parameter.detach().clone()
                continue
            averages.append(state[AVERAGE])
            weights.append(parameter)
        if averages:
            self._average(averages, weights, None)

    @contextmanager
    @torch.no_grad()
    def lent(self) -> Iterator[None]:
        """Give every weight the value of its average inside the block, and its own again after it."""
        kept = {p: p.detach().clone() for p in self.params.values() if AVERAGE in self.state.get(p, {})}
        for parameter in kept:
            parameter.copy_(self.state[parameter][AVERAGE])
        try:
            yield
        finally:
            for parameter, value in kept.items():
                parameter.copy_(value)


@contextmanager
def averaged_weights(optimizer: CombinedOptimizer) -> Iterator[None]:
    """Give the dense weights the values of their averages inside the block, where the config asks for averages."""
    with ExitStack() as stack:
        for _, part in optimizer.optimizers:
            if isinstance(part, Averaging):
                stack.enter_context(part.lent())
        yield
