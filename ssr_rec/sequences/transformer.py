"""BST is a transformer over the events and the target (Chen, Zhao, Li, Huang, Ou, 2019)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import LAYER_NORM_FLOPS, SOFTMAX_FLOPS, Flops, dense_flops
from ssr_rec.over_archs.layers import Dropout
from ssr_rec.over_archs.settings import LAYER_NORM_EPS
from ssr_rec.sequences.attention import PaddedRows, Tokens, blocks_of, full_block, self_attention
from ssr_rec.sequences.base import SequenceEncoder, linear
from ssr_rec.sequences.jagged import Jagged, Shared, age_bucket
from ssr_rec.sequences.settings import TransformerConfig
from ssr_rec.sequences.target_attention import scores_of, weighted, weighted_sum

POSITION_STD = 0.02


class TransformerLayer(nn.Module):
    """Computes ``y = LN(x + MH(x))``, then ``LN(y + W_2 leaky_relu(W_1 y + b_1) + b_2)``: (N + B, C) -> (N + B, C)."""

    def __init__(self, width: int, settings: TransformerConfig) -> None:
        super().__init__()
        self.width, self.num_heads = width, settings.num_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.query_key_value = linear(width, 3 * width, settings.initializer, parts=3)
        self.mix = linear(width, width, settings.initializer)
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.hidden = hidden = settings.ffn_ratio * width
        self.feed_forward = nn.Sequential(
            linear(width, hidden, settings.initializer, bias=True),
            nn.LeakyReLU(),
            linear(hidden, width, settings.initializer, bias=True),
        )
        self.output_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(settings.dropout)

    def forward(self, tokens: Tensor, blocks: list[PaddedRows]) -> Tensor:
        """Every token attends to every token of its row."""
        return self._after(tokens, self_attention(self.query_key_value(tokens), blocks, self._attend))

    def of_target(self, tokens: Tensor, num_events: int, jagged: Jagged, shared: Tensor | None = None) -> Tensor:
        """Return what the layer gives for the targets alone, (B, C): only they attend.

        Args:
            tokens: ``num_events`` of events, then one of each target.
            shared: (N,) which event among the tokens is each of the rows'; None: the k-th.
        """
        weights, own, values, own_value = self.target_weights(tokens, num_events, jagged, shared)
        heads = weighted_sum(weights, values, jagged) + weighted(own, own_value)
        return self._after(tokens[num_events:], heads)

    def target_weights(
        self, tokens: Tensor, num_events: int, jagged: Jagged, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the target's weights of the events (N, heads) and of itself (B, heads), and the values of both."""
        num_rows = jagged.lengths.shape[0]
        of_query, of_others = self.query_key_value.weight.split([self.width, 2 * self.width])
        query = F.linear(tokens[num_events:], of_query) * self.scale
        keys, values = F.linear(tokens, of_others).chunk(2, 1)
        keys, own_key = keys.split([num_events, num_rows])
        values, own_value = values.split([num_events, num_rows])
        if shared is not None:
            keys, values = keys[shared], values[shared]
        scores = scores_of(query, keys, self.num_heads, jagged)
        own_score = (query * own_key).unflatten(1, (self.num_heads, -1)).sum(2)
        weights, own = jagged.softmax(scores, own_score)
        return weights, cast(Tensor, own), values, own_value

    def _attend(self, x: Tensor, block: PaddedRows) -> Tensor:
        """Map (b, S, 3 C) to (b, S, C)."""
        queries, keys, values = x.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = block.valid[:, None, None, :]
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)
        return y.transpose(1, 2).flatten(2)

    def _after(self, tokens: Tensor, heads: Tensor) -> Tensor:
        y = self.attention_norm(tokens + self.dropout(self.mix(heads)))
        return self.output_norm(y + self.dropout(self.feed_forward(y)))

    def flops(self, queries: int, tokens: int) -> Flops:
        """Return the cost of a row of ``tokens`` tokens, ``queries`` of which attend; one needs no matrix product."""
        width, pairs = self.width, queries * tokens
        attention = Flops(matmul=4 * pairs * width) if queries > 1 else Flops(elementwise=4 * pairs * width)
        attention += Flops(elementwise=SOFTMAX_FLOPS * pairs * self.num_heads)
        project = dense_flops(width, width, bias=False)
        hidden = self.hidden
        each = project + project + dense_flops(width, hidden) + dense_flops(hidden, width)
        each += Flops(elementwise=2 * hidden + (2 + 1 + 2 * LAYER_NORM_FLOPS) * width)
        return Flops(
            attention.matmul + queries * each.matmul + 2 * tokens * project.matmul,
            attention.elementwise + queries * each.elementwise,
        )


class Transformer(SequenceEncoder):
    """Stacks layers of self-attention; for an empty history the target attends to itself.

    Each token is its event or target, and beside it the embedding of its position. With ``output: target`` the last
    layer is computed for the target alone.

    Raises:
        UserError: event and target of different dims without ``dim``, or heads that do not divide the width.
    """

    settings_class = TransformerConfig

    def __init__(
        self,
        event_dim: int,
        target_dim: int,
        field_dim: int,
        max_length: int,
        settings: TransformerConfig | None = None,
    ) -> None:
        super().__init__(event_dim, target_dim, field_dim, max_length, settings)
        settings = cast(TransformerConfig, self.settings)
        self.needs_ages = settings.positions == "age"
        self.tokens = Tokens(event_dim, target_dim, settings.dim, settings.initializer)
        self.positions, self.width = None, self.tokens.width
        if settings.positions != "none":
            # Position 0 is the target's.
            count = 1 + (settings.age_buckets if self.needs_ages else max_length)
            position_dim = settings.position_dim or field_dim
            self.positions = nn.Parameter(torch.empty(count, position_dim).normal_(0.0, POSITION_STD))
            self.width += position_dim
        if self.width % settings.num_heads:
            raise UserError(
                f"num_heads={settings.num_heads} does not divide the width {self.width} of a token and its position: "
                "choose a divisor of it, or set dim or position_dim"
            )
        self.layers = nn.ModuleList(TransformerLayer(self.width, settings) for _ in range(settings.num_layers))
        self.output = settings.output
        self.set_output(self.width * (max_length + 1 if self.output == "concat" else 1), settings.initializer)

    def encode(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        x = self._before_last(events, target, ages, jagged)
        last = cast(TransformerLayer, self.layers[-1])
        if self.output == "target":
            return last.of_target(x, events.shape[0], jagged)
        y = last(x, blocks_of(jagged, self.max_length))
        if self.output == "concat":
            return full_block(jagged, self.max_length).pad(torch.cat([y, y.new_zeros(1, self.width)])).flatten(1)
        y, own = y.split([events.shape[0], target.shape[0]])
        return (jagged.sum(y) + own) / (jagged.lengths + 1).unsqueeze(1)

    def forward_shared(
        self, events: Tensor, lengths: Tensor, shared: Shared, target: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        if len(self.layers) > 1 or self.output != "target":
            # Events attend to the target, so that they are another row's no more.
            return super().forward_shared(events, lengths, shared, target, ages)
        known_ages = events.new_zeros(0) if ages is None else ages
        tokens = self._before_last(events, cast(Tensor, target), known_ages, Jagged.of(lengths, events.shape[0]))
        jagged = shared.jagged(lengths)
        return self.out(
            cast(TransformerLayer, self.layers[0]).of_target(tokens, events.shape[0], jagged, shared.events)
        )

    def weights(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Return the last layer's weights of each event for its target: (N, heads)."""
        events, target, known_ages, jagged = self.check(events, lengths, target, ages)
        last = cast(TransformerLayer, self.layers[-1])
        tokens = self._before_last(events, target, known_ages, jagged)
        return last.target_weights(tokens, events.shape[0], jagged)[0]

    def _before_last(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        """Return the last layer's input: (N + B, C)."""
        x = self.tokens(events, target)
        if self.positions is not None:
            if self.needs_ages:
                index = age_bucket(ages, self.positions.shape[0] - 1) + 1
            else:
                index = jagged.back().clamp_max(self.max_length)
            index = F.pad(index, (0, target.shape[0]))
            x = torch.cat([x, self.positions.index_select(0, index).to(x.dtype)], 1)
        if len(self.layers) > 1:
            blocks = blocks_of(jagged, self.max_length)
            for layer in self.layers[:-1]:
                x = layer(x, blocks)
        return x

    def flops(self, length: int) -> Flops:
        total, tokens = self.out_flops(), length + 1
        if isinstance(self.tokens.event, nn.Linear):
            event = dense_flops(self.event_dim, self.tokens.width, bias=False)
            total += Flops(length * event.matmul) + dense_flops(self.target_dim, self.tokens.width, bias=False)
        for i, layer in enumerate(self.layers, 1):
            alone = self.output == "target" and i == len(self.layers)
            total += cast(TransformerLayer, layer).flops(1 if alone else tokens, tokens)
        return total + Flops(elementwise=self.width * tokens if self.output == "mean" else 0)
