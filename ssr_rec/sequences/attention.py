"""Runs self-attention over the events of each row and its target, for encoders of several layers.

The vectors of all events and, after them, of all targets are one tensor of tokens (N + B, C). Layers work on tokens,
so that empty positions cost nothing; the attention alone pads, and to the longest of a few rows of similar length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.settings import Initializer
from ssr_rec.sequences.base import linear
from ssr_rec.sequences.jagged import Jagged

BLOCK_ROWS = 64
"""Rows of similar length that are padded together, in training and evaluation on a CPU."""


class Tokens(nn.Module):
    """Brings events and targets to one width: (N, E), (B, Q) -> (N + B, C).

    Args:
        dim: C of two linear layers without bias; None: events and targets stay as they are.

    Raises:
        UserError: without ``dim``, they have different dims.
    """

    def __init__(self, event_dim: int, target_dim: int, dim: int | None, initializer: Initializer) -> None:
        super().__init__()
        if dim is None and event_dim != target_dim:
            raise UserError(
                f"target_dim={target_dim} is not event_dim={event_dim}, but self-attention takes both for tokens: "
                "set dim, the width to bring them to"
            )
        self.width = dim or event_dim
        self.event = linear(event_dim, dim, initializer) if dim else nn.Identity()
        self.target = linear(target_dim, dim, initializer) if dim else nn.Identity()

    def forward(self, events: Tensor, target: Tensor) -> Tensor:
        return torch.cat([self.event(events), self.target(target)])


@dataclass(frozen=True)
class PaddedRows:
    """Pads some rows of the batch on the left to one length; their last position is the target.

    Attributes:
        index: (b, S) the token at each position; N + B, one past the last token, where there is none.
        valid: (b, S) whether there is one.
    """

    index: Tensor
    valid: Tensor

    def pad(self, tokens: Tensor) -> Tensor:
        """Map (N + B + 1, C), the last of them zeros, to (b, S, C)."""
        return tokens.index_select(0, self.index.flatten()).view(*self.index.shape, tokens.shape[1])


def block_of(jagged: Jagged, rows: Tensor, size: int) -> PaddedRows:
    """Pad these rows to ``size`` events and the target; of a longer history the oldest events are left out."""
    num_events, num_rows = jagged.rows.shape[0], jagged.lengths.shape[0]
    steps = torch.arange(size, 0, -1, device=rows.device)
    valid = steps <= jagged.lengths[rows].unsqueeze(1)
    events = torch.where(valid, jagged.offsets[rows + 1].unsqueeze(1) - steps, num_events + num_rows)
    target = (num_events + rows).unsqueeze(1)
    return PaddedRows(torch.cat([events, target], 1), F.pad(valid, (0, 1), value=True))


def blocks_of(jagged: Jagged, max_length: int) -> list[PaddedRows]:
    """Cut the batch into rows of similar length; into one block of L where sizes must not depend on the numbers."""
    num_rows = jagged.lengths.shape[0]
    if torch.compiler.is_compiling() or jagged.lengths.device.type != "cpu" or num_rows == 0:
        return [block_of(jagged, torch.arange(num_rows, device=jagged.lengths.device), max_length)]
    parts = jagged.lengths.argsort(stable=True).split(BLOCK_ROWS)
    return [block_of(jagged, rows, int(jagged.lengths[rows[-1]])) for rows in parts]


def self_attention(tokens: Tensor, blocks: list[PaddedRows], attend: Callable[[Tensor, PaddedRows], Tensor]) -> Tensor:
    """Run ``attend``, (b, S, C) -> (b, S, A), on the padded rows of every block: (N + B, C) -> (N + B, A)."""
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    outputs = torch.cat([attend(block.pad(padded), block).flatten(0, 1) for block in blocks])
    index = torch.cat([block.index.flatten() for block in blocks])
    places = torch.arange(index.shape[0], device=index.device)
    # Positions without a token all write to the last place, which is cut off.
    place = index.new_zeros(tokens.shape[0] + 1).index_copy(0, index, places)[:-1]
    return outputs.index_select(0, place)


def full_block(jagged: Jagged, max_length: int) -> PaddedRows:
    """Pad all rows to L events."""
    return block_of(jagged, torch.arange(jagged.lengths.shape[0], device=jagged.lengths.device), max_length)
