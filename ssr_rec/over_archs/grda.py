"""GRDA, generalized regularized dual averaging, is an SGD whose small weights become exact zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.autofis_settings import LEARNING_RATE, MU, C


class GRDA(Optimizer):
    """Runs soft-thresholded SGD whose threshold grows with the steps (Chao and Cheng 2019, "A generalization of
    regularized dual averaging and its dynamics").

    In step k, for every weight w with its accumulator a, which starts at the weight's value before step 1::

        a <- a - lr * gradient
        w <- sign(a) * relu(|a| - g_k)        g_k = c * lr^(1/2 + mu) * k^mu

    A weight at zero keeps its accumulator and returns once that outgrows the threshold. ``g`` is summed up from its
    differences, so a learning rate that changes scales what is added from then on, as in the public implementations.

    Args:
        lr: learning rate, that of SGD.
        c: strength of the threshold; 0 is SGD.
        mu: how fast the threshold grows; its authors advise 0.5 < mu < 1.

    Raises:
        UserError: lr or c below 0, mu outside (0, 1).
    """

    def __init__(self, params: Iterable[Any], lr: float = LEARNING_RATE, c: float = C, mu: float = MU) -> None:
        if not (lr >= 0 and c >= 0 and 0 < mu < 1):
            raise UserError(f"GRDA needs lr >= 0, c >= 0 and 0 < mu < 1; got lr={lr}, c={c}, mu={mu}")
        super().__init__(params, {"lr": lr, "c": c, "mu": mu})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["c"], group["mu"])
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, c: float, mu: float) -> None:
        state = self.state[parameter]
        if not state:
            # At the first step and not before: weights may be loaded or broadcast after the optimizer is made.
            # The step stays on the CPU, so that reading it does not wait for the GPU.
            state["step"] = torch.zeros(())
            state["accumulator"] = parameter.detach().clone(memory_format=torch.preserve_format)
            state["threshold"] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        state["step"] += 1
        step = state["step"].item()
        state["threshold"] += c * lr ** (0.5 + mu) * (step**mu - (step - 1) ** mu)
        accumulator = state["accumulator"].add_(gradient, alpha=-lr)
        parameter.copy_(accumulator.sign() * (accumulator.abs() - state["threshold"]).relu())
