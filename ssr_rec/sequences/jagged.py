"""Lays out histories of different lengths without padding: all rows' events in a line, and how many each row has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Jagged:
    """Says which row each of N events belongs to.

    Attributes:
        lengths: (B,) events of each row.
        offsets: (B + 1,) where each row's events begin and, last, where all end.
        rows: (N,) the row of each event.
    """

    lengths: Tensor
    offsets: Tensor
    rows: Tensor

    @staticmethod
    def of(lengths: Tensor, num_events: int) -> Jagged:
        """Lay out ``num_events`` events, the sum of ``lengths``."""
        lengths = lengths.long()
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        if torch.compiler.is_compiling():
            # A compiled program has no form for no events at all, and is given one that is no row's: any row will do.
            events = torch.arange(num_events, device=lengths.device)
            rows = torch.searchsorted(offsets[1:], events, right=True).clamp_max(lengths.shape[0] - 1)
            return Jagged(lengths, offsets, rows)
        rows = torch.arange(lengths.shape[0], device=lengths.device)
        return Jagged(lengths, offsets, torch.repeat_interleave(rows, lengths, output_size=num_events))

    def sum(self, values: Tensor) -> Tensor:
        """Add up the events of each row: (N, C) -> (B, C), zeros for a row without any."""
        return _Sum.apply(values, self.rows, self.offsets)

    def take(self, x: Tensor) -> Tensor:
        """Give each event what its row has: (B, C) -> (N, C)."""
        return _Take.apply(x, self.rows, self.offsets)

    def back(self) -> Tensor:
        """Count the events from each one to the end of its row, itself included: (N,), 1 for the most recent."""
        return self.offsets[self.rows + 1] - torch.arange(self.rows.shape[0], device=self.rows.device)

    def softmax(self, scores: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalise scores (N, heads) over each row's events and, if given, one more a row: ``own`` (B, heads)."""
        index, shape = self.rows.unsqueeze(1).expand_as(scores), (self.lengths.shape[0], scores.shape[1])
        # The result does not depend on what is subtracted, so it needs no gradient.
        top = scores.new_zeros(shape).scatter_reduce(0, index, scores.detach(), "amax", include_self=False)
        if own is not None:
            own_top = torch.where(self.lengths.unsqueeze(1) > 0, torch.maximum(top, own.detach()), own.detach())
            weights, own = (scores - self.take(own_top)).exp(), (own - own_top).exp()
            total = self.sum(weights) + own
            return weights / self.take(total), own / total
        weights = (scores - self.take(top)).exp()
        # A row with events has a total of at least 1, the weight of its top score.
        return weights / self.take(self.sum(weights).clamp_min(1.0)), None


class Shared(NamedTuple):
    """Says which of G histories each of B rows has, where several rows have the same one.

    Attributes:
        rows: (B,) the history of each row.
        events: (N,) the event of the G histories that is each of the rows' N events, row by row.
    """

    rows: Tensor
    events: Tensor

    def jagged(self, lengths: Tensor) -> Jagged:
        """Lay out the rows' events, of the histories' ``lengths`` (G,)."""
        return Jagged.of(lengths[self.rows], self.events.shape[0])


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    """Take the first ``lengths`` events of each row: (B, L, C) -> (N, C)."""
    return padded[torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)]


def age_bucket(ages: Tensor, num_buckets: int) -> Tensor:
    """Number the half octaves of ``age + 1``: 0, .5, 1, 2, 3, 5, 7, 11, .. begin one each; the last has no end.

    The bucket is read off the bits of the float, exactly: a logarithm is rounded differently in the tail of a vector,
    so that a row's bucket could change with its place in the batch.
    """
    bits = (ages.clamp_min(0).float() + 1).view(torch.int32)
    return ((bits >> 22) - (127 << 1)).clamp_max(num_buckets - 1)


class _Sum(torch.autograd.Function):
    """Sums over each row's events. Each row is added up alone and in order, so that batch mates change no bit of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, offsets)
        events = torch.arange(values.shape[0], device=values.device)
        return F.embedding_bag(events, values.contiguous(), offsets, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(grads[0], *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    """Takes what each event's row has; the backward pass is ``_Sum``, several times faster than ``index_select``'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, offsets)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grads[0], *ctx.saved_tensors), None, None


def age_of_bucket(bucket: int) -> float:
    """Return the least age of a bucket of ``age_bucket``."""
    return (1 + bucket % 2 / 2) * 2 ** (bucket // 2) - 1
