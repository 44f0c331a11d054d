"""Runs Adam so that it moves only the rows of a table that the batch has looked up, as FBGEMM's does on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LazyAdam(Optimizer):
    """Runs Adam (Kingma and Ba, 2015) for tables (rows, dim), without a step for rows whose gradient is all zero.

    A row of the batch: ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``,
    ``w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)``, where t counts all steps. Other rows
    and their state stay as they are. That is the arithmetic of FBGEMM's ``EmbOptimType.ADAM``; the decay is decoupled.

    Args:
        params: the tables; their gradients are dense.
        lr: the rate.
        betas: decay of the two moments.
        eps: added to the root of the second.
        weight_decay: a share of the row, decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move the looked-up rows of every table."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
                state["step"] += 1
                t = state["step"].item()
                rows = table.grad.ne(0).any(dim=1).nonzero().squeeze(1)
                gradient, weight = table.grad[rows], table[rows]
                m = state["exp_avg"][rows].lerp_(gradient, 1 - beta1)
                v = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                state["exp_avg"][rows], state["exp_avg_sq"][rows] = m, v
                step = m.div(1 - beta1**t).div_(v.div(1 - beta2**t).sqrt_().add_(group["eps"]))
                table[rows] = weight - group["lr"] * (step + group["weight_decay"] * weight)
