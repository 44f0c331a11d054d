"""Pools a row's events: their mean, their sum or the last."""

from __future__ import annotations

import torch
from torch import Tensor

from ssr_rec.over_archs.base import Flops
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.jagged import Jagged, Shared
from ssr_rec.sequences.settings import PoolConfig


class Pool(SequenceEncoder):
    """Takes the mean, sum or last of the events; zeros for an empty history. It needs no target."""

    settings_class = PoolConfig
    needs_target = False

    def __init__(
        self, event_dim: int, target_dim: int, field_dim: int, max_length: int, settings: PoolConfig | None = None
    ) -> None:
        super().__init__(event_dim, target_dim, field_dim, max_length, settings)
        self.mode = self.settings.mode
        self.set_output(event_dim)

    def encode(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        if self.mode == "last":
            # The row after the last event, which those without events take, is zeros.
            padded = torch.cat([events, events.new_zeros(1, self.event_dim)])
            return padded[torch.where(jagged.lengths > 0, jagged.offsets[1:] - 1, events.shape[0])]
        total = jagged.sum(events)
        return total / jagged.lengths.clamp_min(1).unsqueeze(1) if self.mode == "mean" else total

    def forward_shared(
        self, events: Tensor, lengths: Tensor, shared: Shared, target: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        return self(events, lengths)[shared.rows]

    def weights(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Return 1 / length (mean), 1 (sum), or 1 for the last event and 0 for the others: (N, 1)."""
        *_, jagged = self.check(events, lengths, target, ages)
        if self.mode == "last":
            return (jagged.back() == 1).to(events.dtype).unsqueeze(1)
        each = jagged.lengths.to(events.dtype).reciprocal() if self.mode == "mean" else torch.ones_like(lengths)
        return each.to(events.dtype)[jagged.rows].unsqueeze(1)

    def flops(self, length: int) -> Flops:
        per_dim = {"mean": length + 1, "sum": length, "last": 0}[self.mode]
        return Flops(elementwise=per_dim * self.event_dim) + self.out_flops()
