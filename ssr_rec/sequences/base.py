"""Defines the contract of every sequence encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import Flops, dense_flops
from ssr_rec.over_archs.layers import init_dense_
from ssr_rec.over_archs.settings import Initializer
from ssr_rec.sequences.jagged import Jagged, Shared

SIGMOID_FLOPS = 4
"""Negation, exp, addition, division."""


class SequenceEncoder(nn.Module, ABC):
    """Turns the events of each row, and the target they are seen from, into m more fields of the input vector.

    ``forward(events (N, E), lengths (B,), target (B, Q), ages (N,)) -> (B, m * D)``. The events of the first row come
    first, then those of the second, and so on; within a row the oldest is first. Nothing is padded. A subclass calls
    ``set_output`` in its constructor and implements ``encode`` and ``flops``.

    Attributes:
        out_fields: m.
        needs_target: false for an encoder that works without a target.
        needs_ages: whether ``forward`` must be given ``ages``.
        settings_class: the pydantic model of ``settings``.

    Args:
        event_dim: E, all columns of an event one after another.
        target_dim: Q; 0 for none, where ``needs_target`` is false.
        field_dim: D.
        max_length: L.
        settings: those of the encoder; None: its defaults.

    Raises:
        UserError: an impossible size; the message has one line.
    """

    settings_class: ClassVar[type[BaseModel]]
    needs_target: ClassVar[bool] = True
    needs_ages: bool = False
    out_fields: int
    out: nn.Module

    def __init__(self, event_dim: int, target_dim: int, field_dim: int, max_length: int, settings: Any = None) -> None:
        super().__init__()
        least = {"event_dim": 1, "target_dim": int(self.needs_target), "field_dim": 1, "max_length": 1}
        given = {"event_dim": event_dim, "target_dim": target_dim, "field_dim": field_dim, "max_length": max_length}
        for key, value in given.items():
            if value < least[key]:
                raise UserError(f"{key}={value}: {type(self).__name__} needs at least {least[key]}")
        self.event_dim, self.target_dim, self.field_dim, self.max_length = event_dim, target_dim, field_dim, max_length
        self.settings: Any = self.settings_class() if settings is None else settings

    @abstractmethod
    def encode(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        """Return the encoder's own vector (B, width); without a target or ages, those tensors are empty."""

    @abstractmethod
    def flops(self, length: int) -> Flops:
        """Return the cost of one forward pass for one row with ``length`` events."""

    def weights(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Return how much each event counts for its row's target: (N, heads).

        Raises:
            NotImplementedError: an encoder without such weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weights of events")

    def forward(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Map (N, E), (B,), (B, Q), (N,) to (B, m * D).

        Args:
            events: all rows' events, the oldest of a row first.
            lengths: events of each row, at most L, N together.
            target: what the events are seen from, such as the candidate item.
            ages: time from each event to its row, at least 0, integers or floats of any one unit.

        Raises:
            ValueError: the shapes do not fit each other, a history is longer than L, or ages or target are missing.
        """
        return self.out(self.encode(*self.check(events, lengths, target, ages)))

    def forward_shared(
        self, events: Tensor, lengths: Tensor, shared: Shared, target: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        """Map (n, E) and (G,) of G histories, and targets (B, Q) of rows that share them, to (B, m * D).

        It is ``forward`` of every row with its own copy of its history. An encoder that computes something of the
        events alone overrides this, to do that once a history; this one only spares their lookups.
        """
        ages = None if ages is None else ages[shared.events]
        return self(events[shared.events], lengths[shared.rows], target, ages)

    def set_output(self, width: int, initializer: Initializer = "glorot", own_projection: bool = False) -> None:
        """Decide m: a linear layer from ``width`` to ``settings.fields`` fields, or ``width`` as it is.

        Args:
            width: dims of what ``encode`` returns.
            own_projection: the encoder has a linear layer of its own for its last step; without ``settings.fields``
                it gives E dims.

        Raises:
            UserError: ``settings.fields`` is None and the dims are no multiple of D.
        """
        fields = getattr(self.settings, "fields", None)
        dims = fields * self.field_dim if fields else self.event_dim if own_projection else width
        if dims % self.field_dim:
            raise UserError(
                f"{type(self).__name__} gives {dims} dims, no multiple of field_dim={self.field_dim}: set fields"
            )
        self.out_fields = dims // self.field_dim
        if fields or own_projection:
            self.out = linear(width, dims, initializer)
        else:
            self.out = nn.Identity()

    def out_flops(self) -> Flops:
        """Return the cost of the linear layer of ``set_output``."""
        if isinstance(self.out, nn.Linear):
            return dense_flops(self.out.in_features, self.out.out_features, bias=False)
        return Flops()

    @property
    def num_parameters(self) -> int:
        """Return trainable parameters, without tables."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def check(
        self, events: Tensor, lengths: Tensor, target: Tensor | None, ages: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Jagged]:
        """Return what ``encode`` takes.

        Raises:
            ValueError: see ``forward``. Lengths are looked at on the CPU alone, and not while a graph is made.
        """
        name = type(self).__name__
        if target is None and self.needs_target:
            raise ValueError(f"{name} needs a target (B, {self.target_dim}): give one")
        if ages is None and self.needs_ages:
            raise ValueError(f"{name} needs the ages of the events (N,): give them, or choose settings without age")
        if not torch.compiler.is_compiling():
            self._check_shapes(events, lengths, target, ages)
        target = events.new_zeros(0) if target is None else target
        ages = events.new_zeros(0) if ages is None else ages
        return events, target, ages, Jagged.of(lengths, events.shape[0])

    def _check_shapes(self, events: Tensor, lengths: Tensor, target: Tensor | None, ages: Tensor | None) -> None:
        wanted = {
            "events": (events, (None, self.event_dim)),
            "lengths": (lengths, (None,)),
            "target": (target, (lengths.shape[0], self.target_dim)),
            "ages": (ages, (events.shape[0],)),
        }
        for key, (tensor, shape) in wanted.items():
            if tensor is None:
                continue
            fits = [n is None or n == m for n, m in zip(shape, tensor.shape, strict=False)]
            if tensor.dim() != len(shape) or not all(fits):
                text = ", ".join("any" if n is None else str(n) for n in shape)
                raise ValueError(f"{key} of shape {tuple(tensor.shape)}: {type(self).__name__} wants ({text})")
        if lengths.device.type == "cpu" and lengths.numel():
            least, most, total = (int(x) for x in (lengths.min(), lengths.max(), lengths.sum()))
            if least < 0 or most > self.max_length:
                raise ValueError(f"lengths from {least} to {most}: must be within 0 and max_length={self.max_length}")
            if total != events.shape[0]:
                raise ValueError(f"lengths add up to {total}, but there are {events.shape[0]} events")


def linear(fan_in: int, fan_out: int, initializer: Initializer, bias: bool = False, parts: int = 1) -> nn.Linear:
    """Make a linear layer of ``parts`` projections side by side, each initialised as one of its own."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    init_dense_(layer.weight, layer.bias, fan_in, fan_out // parts, initializer)
    return layer
