"""Defines layers whose weights depend on the domain of a row; rows are laid into blocks of one domain each.

Shapes: ``N`` domains, ``G`` dense layers side by side, ``K`` blocks. The number of blocks depends on the number of rows
alone, so that the layers can be exported for any batch size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.over_archs.base import Flops, dense_flops

BLOCK = 32
"""Rows of a block: fewer would copy a domain's weights more often, more would multiply more rows that are empty."""


class DomainRows(NamedTuple):
    """Says which domain each row of a batch has, and where it lies among the blocks."""

    domains: Tensor
    """(B,) int64."""
    blocks: Tensor
    """(B,) int64, the block of each row."""
    places: Tensor
    """(B,) int64, the place within it."""
    of_blocks: Tensor
    """(K,) int64, the domain of each block."""

    def weights(self, table: Tensor) -> Tensor:
        """Return each row's part of a table of weights: (N, ...) to (B, ...)."""
        return _rows(table, self.domains)


def domain_rows(domains: Tensor, num_domains: int) -> DomainRows:
    """Lay rows of the domains (B,) into blocks.

    A domain of c rows has ``ceil(c / BLOCK)`` blocks, which is at most ``(c + BLOCK - 1) / BLOCK``.
    """
    rows = domains.shape[0]
    is_of = (domains.unsqueeze(1) == torch.arange(num_domains, device=domains.device)).long()
    rank = is_of.cumsum(0).gather(1, domains.unsqueeze(1)).squeeze(1) - 1
    needed = (is_of.sum(0) + BLOCK - 1) // BLOCK
    ends = needed.cumsum(0)
    most = torch.arange((rows + (BLOCK - 1) * torch.sym_min(rows, num_domains)) // BLOCK, device=domains.device)
    # What is left of the blocks is empty, and any domain will do for it.
    of_blocks = (most.unsqueeze(1) >= ends).sum(1).clamp_max(num_domains - 1)
    return DomainRows(domains, (ends - needed)[domains] + rank // BLOCK, rank % BLOCK, of_blocks)


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """Return rows of (N, ...), by the gather whose backward pass is the fastest on the CPU."""
    return F.embedding(places, table.flatten(1)).unflatten(1, table.shape[1:])


class DomainLinear(nn.Module):
    """Applies to each row G dense layers of the row's domain: (B, G, in) -> (B, G, out). Begins at zero."""

    def __init__(self, num_domains: int, groups: int, fan_in: int, fan_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_domains, groups, fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(num_domains, groups, fan_out)) if bias else None

    def forward(self, x: Tensor, rows: DomainRows) -> Tensor:
        laid = x.new_zeros(rows.of_blocks.shape[0], BLOCK, *x.shape[1:]).index_put((rows.blocks, rows.places), x)
        weight = _rows(self.weight, rows.of_blocks)
        # Group by group, as torch.export cannot split a product of K and G again.
        products = [torch.bmm(laid[:, :, group], weight[:, group]) for group in range(weight.shape[1])]
        y = torch.stack([product[rows.blocks, rows.places] for product in products], 1)
        return y if self.bias is None else y + rows.weights(self.bias)

    def flops(self) -> Flops:
        """Return the cost for one row, without the empty rows of blocks."""
        _, groups, fan_in, fan_out = self.weight.shape
        one = dense_flops(fan_in, fan_out, bias=self.bias is not None)
        return Flops(groups * one.matmul, groups * one.elementwise)
