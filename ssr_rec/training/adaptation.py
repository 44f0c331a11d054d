"""Lets an over-arch change what no optimizer can, such as the dims that the views of SSR-A see."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.over_archs.base import OverArch


class Adaptation:
    """Keeps an over-arch's last input in training and the gradient for it, for the over-arch's ``look``.

    It keeps references and no copies, from outside of what ``compile`` compiles.

    Attributes:
        every: steps from one ``adapt`` to the next; None: the over-arch does not adapt, or no longer.

    Args:
        group: steps from one update of the over-arch to the next. An ``adapt`` waits for one.
    """

    def __init__(self, over_arch: OverArch, optimizer: CombinedOptimizer, group: int = 1) -> None:
        self._over_arch, self._optimizer = over_arch, optimizer
        self._x: Tensor | None = None
        self._grad: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._times, self._group = over_arch.adapts(), group
        self.every = self._times.every if self._times else None
        if self._times is not None:
            self._hook = over_arch.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A batch that is left out has no gradient: that of an earlier one must not stand for it.
        self._x = self._grad = None
        if module.training and inputs[0].requires_grad:
            self._x = inputs[0].detach()
            inputs[0].register_hook(self._keep_gradient)

    def _keep_gradient(self, grad: Tensor) -> None:
        self._grad = grad.detach()

    def after(self, step: int) -> None:
        """Look at the batch of a step, adapt if that is due, and end when it was the last time. Collective.

        Args:
            step: from 1, after its update.
        """
        if self._times is None or self._hook is None:
            return
        every, until = self._times
        if every < step <= until and self._x is not None and self._grad is not None:
            self._over_arch.look(self._x, self._grad, self)
        if step % self._group:
            return
        # Also the last one waits for the update, which may be after ``until``.
        last_due = min(step, until) // every * every
        if last_due > max(step - self._group, every):
            self._over_arch.adapt(step, self._state, self)
        if step >= until:
            self._hook.remove()
            self.every = self._hook = self._x = self._grad = None

    def _state(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for _, part in self._optimizer.optimizers:
            found = {**found, **part.state.get(parameter, {})}
        return found

    def add(self, tensor: Tensor) -> None:
        """Add up the tensors of all ranks, in place."""
        dist.all_reduce(tensor)

    def take_first(self, tensor: Tensor) -> None:
        """Give every rank the tensor of rank 0, in place."""
        dist.broadcast(tensor, 0)
