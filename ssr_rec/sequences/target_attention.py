"""Target attention is multi-head scaled dot product attention over the events, whose only query is the target."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import LAYER_NORM_FLOPS, SOFTMAX_FLOPS, Flops, dense_flops
from ssr_rec.over_archs.layers import Dropout
from ssr_rec.over_archs.settings import LAYER_NORM_EPS
from ssr_rec.sequences.base import SequenceEncoder, linear
from ssr_rec.sequences.jagged import Jagged, Shared
from ssr_rec.sequences.settings import TargetAttentionConfig


def scores_of(queries: Tensor, keys: Tensor, num_heads: int, jagged: Jagged) -> Tensor:
    """Multiply each event's key (N, A) with its row's query (B, A), head by head: (N, heads)."""
    return (jagged.take(queries) * keys).unflatten(1, (num_heads, -1)).sum(2)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply values (N, A), head by head, by their weights (N, heads)."""
    return (weights.unsqueeze(2) * values.unflatten(1, (weights.shape[1], -1))).flatten(1)


def weighted_sum(weights: Tensor, values: Tensor, jagged: Jagged) -> Tensor:
    """Add up each row's values (N, A), head by head with their weights (N, heads): (B, A)."""
    return jagged.sum(weighted(weights, values))


class TargetAttention(SequenceEncoder):
    """Computes ``concat over heads (sum of softmax(q k / sqrt(d)) v) W_o``, without biases; zeros for an empty history.

    Raises:
        UserError: the heads do not divide the attention's dims.
    """

    settings_class = TargetAttentionConfig

    def __init__(
        self,
        event_dim: int,
        target_dim: int,
        field_dim: int,
        max_length: int,
        settings: TargetAttentionConfig | None = None,
    ) -> None:
        super().__init__(event_dim, target_dim, field_dim, max_length, settings)
        settings = cast(TargetAttentionConfig, self.settings)
        self.width, self.num_heads = settings.attention_dim or event_dim, settings.num_heads
        if self.width % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide attention_dim={self.width}: choose a divisor of it"
            )
        self.query = linear(target_dim, self.width, settings.initializer)
        self.key_value = linear(event_dim, 2 * self.width, settings.initializer, parts=2)
        self.scale = (self.width // self.num_heads) ** -0.5
        self.layer_norm = settings.layer_norm
        self.dropout = Dropout(settings.dropout)
        self.set_output(self.width, settings.initializer, own_projection=True)

    def encode(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        return self._attend(*self._keys_and_values(events), target, jagged)

    def forward_shared(
        self, events: Tensor, lengths: Tensor, shared: Shared, target: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        keys, values = (once[shared.events] for once in self._keys_and_values(events))
        jagged = shared.jagged(lengths)
        return self.out(self._attend(keys, values, cast(Tensor, target), jagged))

    def _keys_and_values(self, events: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer_norm:
            return self._keys(events), F.linear(events, self.key_value.weight[self.width :])
        keys, values = self.key_value(events).chunk(2, 1)
        return keys, values

    def _attend(self, keys: Tensor, values: Tensor, target: Tensor, jagged: Jagged) -> Tensor:
        return weighted_sum(self.dropout(self._weights(keys, target, jagged)), values, jagged)

    def weights(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Return the softmax weights of each event: (N, heads)."""
        events, target, _, jagged = self.check(events, lengths, target, ages)
        return self._weights(self._keys(events), target, jagged)

    def _keys(self, events: Tensor) -> Tensor:
        return F.linear(self._compared(events), self.key_value.weight[: self.width])

    def _compared(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], eps=LAYER_NORM_EPS) if self.layer_norm else x

    def _weights(self, keys: Tensor, target: Tensor, jagged: Jagged) -> Tensor:
        scores = scores_of(self.query(self._compared(target)) * self.scale, keys, self.num_heads, jagged)
        return jagged.softmax(scores)[0]

    def flops(self, length: int) -> Flops:
        row = dense_flops(self.target_dim, self.width, bias=False) + Flops(elementwise=self.width)
        event = dense_flops(self.event_dim, 2 * self.width, bias=False)
        # A key times a query, and a value times a weight, are sums of products that no matrix product makes.
        event += Flops(elementwise=2 * 2 * self.width + SOFTMAX_FLOPS * self.num_heads)
        if self.layer_norm:
            row += Flops(elementwise=(LAYER_NORM_FLOPS - 2) * self.target_dim)
            event += Flops(elementwise=(LAYER_NORM_FLOPS - 2) * self.event_dim)
        return row + Flops(length * event.matmul, length * event.elementwise) + self.out_flops()
