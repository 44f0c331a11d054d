"""DIN has a small network weigh each event against the target (Zhou et al., KDD 2018)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.kernels.dice import dice, gated
from ssr_rec.over_archs.base import FOLDED_NORM_FLOPS, SOFTMAX_FLOPS, Flops, dense_flops
from ssr_rec.over_archs.layers import BATCH_NORM_MOMENTUM, Dropout, init_dense_
from ssr_rec.sequences.base import SIGMOID_FLOPS, SequenceEncoder, linear
from ssr_rec.sequences.jagged import Jagged, Shared
from ssr_rec.sequences.settings import DINConfig

DICE_EPS = 1e-8
PRELU_START = 0.25


class PReLU(nn.Module):
    """Gives ``max(x, 0) + alpha min(x, 0)`` per dim: (N, C) -> (N, C), in half the time of ``nn.PReLU``'s backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((width,), PRELU_START))

    def forward(self, x: Tensor) -> Tensor:
        positive = F.relu(x)
        return positive + self.alpha * (x - positive)


class Dice(nn.Module):
    """Gives Dice, ``p x + (1 - p) alpha x``, ``p = sigmoid((x - mean) / sqrt(var + eps))`` per dim: (N, C) -> (N, C).

    In training the mean and the variance are those of the batch's events, so that batch mates matter, as with any
    batch norm; a single event has no variance and takes the running ones, which evaluation takes too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] > 1:
            return dice(x, self.alpha, self.running_mean, self.running_var, BATCH_NORM_MOMENTUM, DICE_EPS)
        normal = F.batch_norm(x, self.running_mean, self.running_var, None, None, eps=DICE_EPS)
        return gated(x, normal, self.alpha)


ACTIVATIONS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "prelu": (PReLU, 4),
    "dice": (Dice, FOLDED_NORM_FLOPS + SIGMOID_FLOPS + 4),
    "sigmoid": (lambda width: nn.Sigmoid(), SIGMOID_FLOPS),
    "relu": (lambda width: nn.ReLU(), 1),
}
"""How each activation is made, and its operations per element."""


class DIN(SequenceEncoder):
    """Sums the events, each times its weight ``a(e, t)``: zeros for an empty history.

    The activation unit's input is ``[e, t, e - t, e * t]``. Its first layer is never given that vector: the parts of
    ``e`` and ``t`` alone are taken out, so that what depends on the target is computed once a row.

    An event may have more columns than the target, which then come last: ``e - t`` and ``e * t`` are of the first Q
    dims of the event.

    Raises:
        UserError: a target of more dims than an event.
    """

    settings_class = DINConfig

    def __init__(
        self, event_dim: int, target_dim: int, field_dim: int, max_length: int, settings: DINConfig | None = None
    ) -> None:
        super().__init__(event_dim, target_dim, field_dim, max_length, settings)
        settings = cast(DINConfig, self.settings)
        if target_dim > event_dim:
            raise UserError(
                f"target_dim={target_dim} is more than event_dim={event_dim}: DIN compares the target's columns with "
                "the event's first ones; give the event every column of the target, in the same order"
            )
        first, *others = settings.hidden
        fan_in = event_dim + 3 * target_dim
        self.weight = nn.Parameter(torch.empty(first, fan_in))
        self.bias = nn.Parameter(torch.empty(first))
        init_dense_(self.weight, self.bias, fan_in, first, settings.initializer)
        make, self.activation_flops = ACTIVATIONS[settings.activation]
        self.layers = nn.Sequential(make(first))
        for width in others:
            self.layers.extend([linear(first, width, settings.initializer, bias=True), make(width)])
            first = width
        self.layers.append(linear(first, 1, settings.initializer, bias=True))
        self.dropout = Dropout(settings.dropout)
        self.set_output(event_dim)

    def encode(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        return jagged.sum(self.dropout(self._weights(events, target, jagged)) * events)

    def forward_shared(
        self, events: Tensor, lengths: Tensor, shared: Shared, target: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        target, jagged = cast(Tensor, target), shared.jagged(lengths)
        of_event, of_product, per_row = self._first_layer(target)
        # What the first layer makes of an event alone, once a history.
        of_events = F.linear(events, of_event)[shared.events]
        events = events[shared.events]
        product = events[:, : self.target_dim] * jagged.take(target)
        first = torch.addmm(jagged.take(per_row) + of_events, product, of_product.T)
        return self.out(jagged.sum(self._scored(first, jagged) * events))

    def weights(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Return a(e, t) of each event: (N, 1)."""
        events, target, _, jagged = self.check(events, lengths, target, ages)
        return self._weights(events, target, jagged)

    def _weights(self, events: Tensor, target: Tensor, jagged: Jagged) -> Tensor:
        of_event, of_product, per_row = self._first_layer(target)
        product = events[:, : self.target_dim] * jagged.take(target)
        both, of_both = torch.cat([events, product], 1), torch.cat([of_event, of_product], 1)
        return self._scored(torch.addmm(jagged.take(per_row), both, of_both.T), jagged)

    def _first_layer(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first layer's weights of an event and of its product with the target, and what it adds a row."""
        of_event, of_target, of_difference, of_product = self.weight.split(
            [self.event_dim, self.target_dim, self.target_dim, self.target_dim], dim=1
        )
        of_event = of_event + F.pad(of_difference, (0, self.event_dim - self.target_dim))
        return of_event, of_product, F.linear(target, of_target - of_difference, self.bias)

    def _scored(self, first: Tensor, jagged: Jagged) -> Tensor:
        """Return a(e, t) of what the first layer gives."""
        scores = self.layers(first)
        return jagged.softmax(scores)[0] if self.settings.softmax else scores

    def flops(self, length: int) -> Flops:
        first, *_ = widths = [*self.settings.hidden, 1]
        row = dense_flops(self.target_dim, first)
        event = dense_flops(self.event_dim + self.target_dim, first, bias=False)
        event += Flops(elementwise=self.target_dim + first + self.activation_flops * sum(widths[:-1]))
        for fan_in, fan_out in pairwise(widths):
            event += dense_flops(fan_in, fan_out)
        event += Flops(elementwise=2 * self.event_dim + SOFTMAX_FLOPS * self.settings.softmax)
        # The two sums of weights that make the first layer's are not a row's: one a batch.
        return row + Flops(length * event.matmul, length * event.elementwise) + self.out_flops()
