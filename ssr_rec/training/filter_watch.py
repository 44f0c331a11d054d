"""Watches what the filters of an over-arch let through while it trains, for progress rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WATCHED_ROWS = 256
"""Rows of a batch, each rank's first, that the figures are of."""


class FilterWatch:
    """Keeps the last training output of each filter: its first rows, a copy of a few hundred kilobytes a step.

    An over-arch that is compiled as a whole is not watched: its filters are no calls of their own.

    Args:
        filters: see ``OverArch.sparse_filters``.
    """

    def __init__(self, filters: Sequence[nn.Module]) -> None:
        self._last: list[Tensor | None] = [None] * len(filters)
        for index, one in enumerate(filters):
            one.register_forward_hook(lambda module, _, output, i=index: self._keep(module, output, i))

    def _keep(self, module: nn.Module, output: Tensor, index: int) -> None:
        if module.training and not torch.compiler.is_compiling():
            self._last[index] = output[:WATCHED_ROWS].detach().clone()

    def figures(self) -> Tensor:
        """Return what ``per_layer`` takes the sums over ranks of: (2 filters + 1,), or () if no filter ran.

        That is, of this rank's rows of the last step, exact zeros' share and mean absolute value of each filter's
        output, then 1; without rows zeros.
        """
        outputs = [output for output in self._last if output is not None]
        if not outputs or len(outputs) < len(self._last):
            return torch.empty(0)
        if not len(outputs[0]):  # an epoch's last batch may have fewer rows than there are ranks
            return torch.zeros(2 * len(outputs) + 1, device=outputs[0].device)
        return torch.stack([*(f(o) for o in outputs for f in (_zeros, _magnitude)), outputs[0].new_ones(())])


def _zeros(output: Tensor) -> Tensor:
    return (output == 0).float().mean()


def _magnitude(output: Tensor) -> Tensor:
    return output.abs().float().mean()


def per_layer(sums: Sequence[float]) -> list[dict[str, float]]:
    """Return ``sparsity`` and ``magnitude`` of each filter, of the sums of all ranks' ``figures``."""
    *of_filters, ranks = sums
    means = [value / ranks for value in of_filters]
    return [{"sparsity": s, "magnitude": m} for s, m in zip(means[::2], means[1::2], strict=True)]
