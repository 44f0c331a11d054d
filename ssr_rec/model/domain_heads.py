"""Defines what each domain adds to the shared heads: nothing at first, so a domain never seen has the shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ssr_rec.over_archs.base import Domain
from ssr_rec.over_archs.domain_layers import DomainLinear, DomainRows, domain_rows


class DomainDeltas(nn.Module):
    """Holds the deltas of each domain to the towers and linear heads of T tasks.

    Args:
        widths: of the heads' input and of every layer of a tower.
    """

    def __init__(self, domain: Domain, num_tasks: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.domain = domain
        self.towers = nn.ModuleList(
            DomainLinear(domain.size, num_tasks, fan_in, fan_out) for fan_in, fan_out in pairwise(widths)
        )
        self.weight = nn.Parameter(torch.zeros(domain.size, num_tasks, widths[-1]))
        self.bias = nn.Parameter(torch.zeros(domain.size, num_tasks))

    def rows_of(self, domain: Tensor) -> DomainRows:
        """Return where the rows of the domains (B,) are computed."""
        return domain_rows(domain, self.domain.size)

    def of_tower(self, layer: int, by_task: Tensor, rows: DomainRows) -> Tensor:
        """Return what a layer of the towers adds before its ReLU: (T, B, in) -> (T, B, out)."""
        return self.towers[layer](by_task.transpose(0, 1), rows).transpose(0, 1)

    def logits(self, features: Tensor, rows: DomainRows) -> Tensor:
        """Return what is added to the logits: (B, H), or (B, T, H), to (B, T)."""
        by_task = features.unsqueeze(1) if features.dim() == 2 else features
        return (by_task * rows.weights(self.weight)).sum(dim=-1) + rows.weights(self.bias)

    def matmul_flops(self) -> int:
        """Return the operations of its products in one forward pass of one row."""
        towers = sum(layer.flops().matmul for layer in self.towers if isinstance(layer, DomainLinear))
        return towers + 2 * self.weight[0].numel()
