"""HSTU is pointwise aggregated attention with a relative bias of position and age (Zhai et al., ICML 2024)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import LAYER_NORM_FLOPS, Flops, dense_flops
from ssr_rec.over_archs.layers import Dropout
from ssr_rec.over_archs.settings import LAYER_NORM_EPS
from ssr_rec.sequences.attention import PaddedRows, Tokens, blocks_of, self_attention
from ssr_rec.sequences.base import SIGMOID_FLOPS, SequenceEncoder, linear
from ssr_rec.sequences.jagged import Jagged, Shared, age_bucket
from ssr_rec.sequences.settings import HSTUConfig
from ssr_rec.sequences.target_attention import scores_of, weighted, weighted_sum

BIAS_STD = 0.02
SILU_FLOPS = SIGMOID_FLOPS + 1


class RelativeBias(nn.Module):
    """Gives what attention adds to a score for the distance of two tokens in events, time, or both; same in all heads.

    Args:
        max_length: L; distances are 0 (a token and itself) to L.
    """

    def __init__(self, max_length: int, settings: HSTUConfig) -> None:
        super().__init__()
        self.num_buckets, self.max_length = settings.age_buckets, max_length
        self.position, self.age = None, None
        if "position" in settings.bias:
            self.position = nn.Parameter(torch.empty(max_length + 1).normal_(0.0, BIAS_STD))
        if "age" in settings.bias:
            self.age = nn.Parameter(torch.empty(self.num_buckets).normal_(0.0, BIAS_STD))

    def of_target(self, ages: Tensor, jagged: Jagged) -> Tensor | float:
        """Return the bias between each event and its target, (N, 1), and 0 where there is none."""
        bias: Tensor | float = 0.0
        if self.position is not None:
            bias = bias + self.position[jagged.back().clamp_max(self.max_length)].unsqueeze(1)
        if self.age is not None:
            bias = bias + self.age.index_select(0, age_bucket(ages, self.num_buckets)).unsqueeze(1)
        return bias

    def own(self) -> Tensor | float:
        """Return the bias between a token and itself."""
        bias: Tensor | float = 0.0
        for table in (self.position, self.age):
            bias = bias if table is None else bias + table[0]
        return bias

    def of_pairs(self, ages: Tensor, num_rows: int, block: PaddedRows) -> Tensor | float:
        """Return the bias between a query and each key not after it, (b or 1, 1, S, S), and 0 where there is none."""
        bias: Tensor | float = 0.0
        size = block.index.shape[1]
        if self.position is not None:
            place = torch.arange(size, device=block.index.device)
            distance = (place.unsqueeze(1) - place).clamp_min(0)
            bias = bias + self.position.index_select(0, distance.flatten()).view(1, 1, size, size)
        if self.age is not None:
            # Targets, and positions without a token, have age 0.
            age = F.pad(ages, (0, num_rows + 1))[block.index]
            bucket = age_bucket(age.unsqueeze(1) - age.unsqueeze(2), self.num_buckets)
            bias = bias + self.age.index_select(0, bucket.flatten()).view(-1, 1, size, size)
        return bias


class HSTULayer(nn.Module):
    """Computes one layer of the paper's equations, from tokens (N + B, C) to tokens:

    U, V, Q, K = split(silu(norm(X) W_1))
    A V        = sum over the tokens j up to i of silu(q_i k_j + bias_ij) v_j / (L + 1)
    Y          = X + W_2 (norm(A V) * U) + b_2
    """

    def __init__(self, width: int, max_length: int, settings: HSTUConfig) -> None:
        super().__init__()
        self.width, self.num_heads, self.max_length = width, settings.num_heads, max_length
        for key in ("attention_dim", "value_dim"):
            if getattr(settings, key) is None and width % self.num_heads:
                raise UserError(f"num_heads={self.num_heads} does not divide the width {width}: set {key}, or dim")
        self.value_width = self.num_heads * (settings.value_dim or width // self.num_heads)
        self.key_width = self.num_heads * (settings.attention_dim or width // self.num_heads)
        self.sizes = [self.value_width, self.value_width, self.key_width, self.key_width]
        self.project = linear(width, sum(self.sizes), settings.initializer, parts=4)
        self.bias = RelativeBias(max_length, settings)
        self.dropout = Dropout(settings.dropout)
        self.mix = linear(self.value_width, width, settings.initializer, bias=True)

    def forward(self, tokens: Tensor, ages: Tensor, jagged: Jagged, blocks: list[PaddedRows]) -> Tensor:
        """Every token attends to those of its row up to itself."""
        return self.of_projected(tokens, self.project_tokens(tokens), ages, jagged, blocks)

    def of_projected(
        self, tokens: Tensor, projected: Tensor, ages: Tensor, jagged: Jagged, blocks: list[PaddedRows]
    ) -> Tensor:
        """Return what ``forward`` does of tokens whose U, V, Q, K are ``projected``."""
        gates, others = projected.split([self.value_width, sum(self.sizes[1:])], 1)
        num_rows = jagged.lengths.shape[0]

        def attend(x: Tensor, block: PaddedRows) -> Tensor:
            values, queries, keys = (
                part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in x.split(self.sizes[1:], 2)
            )
            scores = queries @ keys.transpose(2, 3) + self.bias.of_pairs(ages, num_rows, block)
            # Positions without a token have values of zero.
            return (self._pointwise(scores).tril() @ values).transpose(1, 2).flatten(2)

        return self._after(tokens, gates, self_attention(others, blocks, attend))

    def of_target(self, tokens: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        """Return what the layer gives for the targets alone, (B, C): only they attend."""
        weights, own, values, own_value, gates = self.target_weights(tokens, ages, jagged)
        heads = weighted_sum(weights, values, jagged) + weighted(own, own_value)
        return self._after(tokens[jagged.rows.shape[0] :], gates, heads)

    def of_shared(self, target: Tensor, projected: Tensor, ages: Tensor, jagged: Jagged, events: Tensor) -> Tensor:
        """Return what the layer gives for targets (B, C) that share their events, whose U, V, Q, K are ``projected``.

        Args:
            ages: (N,) of the rows' events.
            jagged: of the rows.
            events: (N,) which of the projected ones are those of the rows.
        """
        _, values, _, keys = projected.split(self.sizes, 1)
        gates, own_value, query, own_key = self.project_tokens(target).split(self.sizes, 1)
        weights, own = self._weigh(query, keys[events], own_key, ages, jagged)
        heads = weighted_sum(weights, values[events], jagged) + weighted(own, own_value)
        return self._after(target, gates, heads)

    def target_weights(self, tokens: Tensor, ages: Tensor, jagged: Jagged) -> tuple[Tensor, ...]:
        """Return the target's weights of the events (N, heads) and of itself (B, heads), the values of both, its U."""
        num_events, num_rows = jagged.rows.shape[0], jagged.lengths.shape[0]
        gates, values, queries, keys = self.project_tokens(tokens).split(self.sizes, 1)
        keys, own_key = keys.split([num_events, num_rows])
        values, own_value = values.split([num_events, num_rows])
        weights, own = self._weigh(queries[num_events:], keys, own_key, ages, jagged)
        return weights, own, values, own_value, gates[num_events:]

    def _weigh(
        self, query: Tensor, keys: Tensor, own_key: Tensor, ages: Tensor, jagged: Jagged
    ) -> tuple[Tensor, Tensor]:
        scores = scores_of(query, keys, self.num_heads, jagged) + self.bias.of_target(ages, jagged)
        own = (query * own_key).unflatten(1, (self.num_heads, -1)).sum(2) + self.bias.own()
        return self._pointwise(scores), self._pointwise(own)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Return U, V, Q and K of tokens, side by side."""
        return F.silu(self.project(F.layer_norm(tokens, (self.width,), eps=LAYER_NORM_EPS)))

    def _pointwise(self, scores: Tensor) -> Tensor:
        return F.silu(scores) / (self.max_length + 1)

    def _after(self, tokens: Tensor, gates: Tensor, heads: Tensor) -> Tensor:
        normal = F.layer_norm(heads, (self.value_width,), eps=LAYER_NORM_EPS)
        return tokens + self.mix(self.dropout(normal * gates))

    def flops(self, alone: bool, tokens: int) -> Flops:
        """Return the cost for one row of ``tokens`` tokens; ``alone``: only the last attends."""
        queries = 1 if alone else tokens
        pairs = queries * tokens
        products = 2 * pairs * (self.key_width + self.value_width)
        attention = Flops(elementwise=products) if alone else Flops(matmul=products)
        biases = (self.bias.position is not None) + (self.bias.age is not None)
        attention += Flops(elementwise=pairs * (self.num_heads * (SILU_FLOPS + 1) + biases))
        project = dense_flops(self.width, sum(self.sizes), bias=False)
        mix = dense_flops(self.value_width, self.width)
        per_token = SILU_FLOPS * sum(self.sizes) + (LAYER_NORM_FLOPS - 2) * self.width
        per_query = mix.elementwise + self.width + (LAYER_NORM_FLOPS - 1) * self.value_width
        return attention + Flops(
            tokens * project.matmul + queries * mix.matmul, tokens * per_token + queries * per_query
        )


class HSTU(SequenceEncoder):
    """Runs layers of HSTU over the events and the target, whose vector after the last layer is the output.

    For an empty history the target attends to itself. Tokens attend to those up to themselves, so that the events'
    vectors do not depend on the target. The last layer is computed for the target alone.

    Raises:
        UserError: event and target of different dims without ``dim``, or heads that do not divide the width.
    """

    settings_class = HSTUConfig

    def __init__(
        self, event_dim: int, target_dim: int, field_dim: int, max_length: int, settings: HSTUConfig | None = None
    ) -> None:
        super().__init__(event_dim, target_dim, field_dim, max_length, settings)
        settings = cast(HSTUConfig, self.settings)
        self.needs_ages = "age" in settings.bias
        self.tokens = Tokens(event_dim, target_dim, settings.dim, settings.initializer)
        self.width = self.tokens.width
        self.layers = nn.ModuleList(HSTULayer(self.width, max_length, settings) for _ in range(settings.num_layers))
        self.set_output(self.width, settings.initializer)

    def encode(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        tokens = self._before_last(events, target, ages, jagged)
        return cast(HSTULayer, self.layers[-1]).of_target(tokens, ages, jagged)

    def forward_shared(
        self, events: Tensor, lengths: Tensor, shared: Shared, target: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        of_events = events.new_zeros(0) if ages is None else ages
        of_rows = of_events if ages is None else ages[shared.events]
        jagged, histories = shared.jagged(lengths), Jagged.of(lengths, events.shape[0])
        vectors = self.tokens.target(target)
        # A history has a place for a target, which no event sees.
        tokens = F.pad(self.tokens.event(events), (0, 0, 0, lengths.shape[0]))
        blocks = blocks_of(histories, self.max_length) if len(self.layers) > 1 else []
        for number, module in enumerate(self.layers, 1):
            layer = cast(HSTULayer, module)
            projected = layer.project_tokens(tokens)
            vectors = layer.of_shared(vectors, projected, of_rows, jagged, shared.events)
            if number < len(self.layers):
                tokens = layer.of_projected(tokens, projected, of_events, histories, blocks)
        return self.out(vectors)

    def weights(
        self, events: Tensor, lengths: Tensor, target: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Return the last layer's weights of each event for its target: (N, heads)."""
        events, target, known_ages, jagged = self.check(events, lengths, target, ages)
        tokens = self._before_last(events, target, known_ages, jagged)
        return cast(HSTULayer, self.layers[-1]).target_weights(tokens, known_ages, jagged)[0]

    def _before_last(self, events: Tensor, target: Tensor, ages: Tensor, jagged: Jagged) -> Tensor:
        tokens = self.tokens(events, target)
        if len(self.layers) > 1:
            blocks = blocks_of(jagged, self.max_length)
            for layer in self.layers[:-1]:
                tokens = layer(tokens, ages, jagged, blocks)
        return tokens

    def flops(self, length: int) -> Flops:
        total, tokens = self.out_flops(), length + 1
        if isinstance(self.tokens.event, nn.Linear):
            event = dense_flops(self.event_dim, self.width, bias=False)
            total += Flops(length * event.matmul) + dense_flops(self.target_dim, self.width, bias=False)
        for i, layer in enumerate(self.layers, 1):
            total += cast(HSTULayer, layer).flops(i == len(self.layers), tokens)
        return total
