"""Runs torch's Muon, also for the matrices of all views in one parameter, and several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ViewMuon(torch.optim.Muon):
    """Runs ``torch.optim.Muon``, to which a parameter (V, in, out) is V matrices.

    Jordan et al., "Muon", 2024. Updates are scaled to the root mean square of AdamW's (``match_rms_adamw``), so that a
    rate and a decay of AdamW can be taken over.

    Args:
        params: of two or three dims.
        lr: the rate.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        # Muon itself refuses three dims; everything else is left to it.
        defaults = torch.optim.Muon([torch.zeros(1, 1)], lr, weight_decay, adjust_lr_fn="match_rms_adamw").defaults
        Optimizer.__init__(self, params, defaults)

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            for whole, parts in (
                (p, params_with_grad),
                (p.grad, grads),
                (state["momentum_buffer"], muon_momentum_bufs),
            ):
                parts.extend(whole.unbind(0) if whole.dim() == 3 else [whole])
        return False


class Together(Optimizer):
    """Steps several optimizers of different parameters as one, whose groups and state are theirs."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step each part."""
        assert closure is None
        for part in self.parts:
            part.step()
