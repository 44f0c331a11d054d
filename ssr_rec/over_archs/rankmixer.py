"""RankMixer mixes tokens without parameters, then gives every token an FFN of its own (Zhu et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import GELU_FLOPS, LAYER_NORM_FLOPS, Flops, OverArch
from ssr_rec.over_archs.layers import Dropout, ViewLinear, make_input_norm
from ssr_rec.over_archs.settings import RankMixerConfig


def mix_tokens(x: Tensor) -> Tensor:
    """Head h of every token, in the order of the tokens, becomes token h (section 3.3.1): (T, B, D) -> (T, B, D)."""
    tokens = x.shape[0]
    return x.unflatten(2, (tokens, -1)).permute(2, 1, 0, 3).flatten(2)


class RankMixerBlock(nn.Module):
    """Computes ``s = LN(mix(x) + x)``, then ``LN(PFFN(s) + s)`` (eq. 1): (T, B, D) -> (T, B, D), tokens first.

    ``PFFN(s)_t = gelu(s_t W_1t + b_1t) W_2t + b_2t`` has weights for every token; LayerNorm's are shared by all.
    """

    def __init__(self, config: RankMixerConfig) -> None:
        super().__init__()
        tokens, dim, inner = config.num_tokens, config.dim, config.ffn_ratio * config.dim
        self.mixing_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.dense1 = ViewLinear(tokens, dim, inner, config.initializer)
        self.dropout = Dropout(config.dropout)
        self.dense2 = ViewLinear(tokens, inner, dim, config.initializer)
        self.ffn_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        s = self.mixing_norm(mix_tokens(x) + x)
        return self.ffn_norm(self.dense2(self.dropout(F.gelu(self.dense1(s)))) + s)

    def flops(self) -> Flops:
        tokens, dim, inner = self.dense1.weight.shape
        residuals_and_norms = 2 * tokens * dim * (1 + LAYER_NORM_FLOPS)
        elementwise = Flops(elementwise=residuals_and_norms + GELU_FLOPS * tokens * inner)
        return self.dense1.flops() + self.dense2.flops() + elementwise


class RankMixer(OverArch):
    """Computes the dense RankMixer: (B, F*D) -> (B, dim).

    The input vector is cut into ``num_tokens`` pieces of equal width whatever field a dim belongs to, zeros
    filling the last one up; each piece has a dense layer of its own to ``dim`` (section 3.2).

    Raises:
        UserError: more tokens than the input can fill, so that one of them would be all zeros.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: RankMixerConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or RankMixerConfig()
        tokens = config.num_tokens
        piece = -(-self.in_features // tokens)
        if (tokens - 1) * piece >= self.in_features:
            raise UserError(
                f"num_tokens={tokens} leaves the last token empty: an input of {self.in_features} dims fills "
                f"{-(-self.in_features // piece)} pieces of {piece}"
            )
        self.padding = tokens * piece - self.in_features
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.tokenizer = ViewLinear(tokens, piece, config.dim, config.initializer)
        self.blocks = nn.Sequential(*(RankMixerBlock(config) for _ in range(config.num_layers)))
        self.out_features = config.dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        pieces = F.pad(x, (0, self.padding)).unflatten(1, (self.config.num_tokens, -1))
        return self.blocks(self.tokenizer(pieces.transpose(0, 1))).mean(0)

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        total += self.tokenizer.flops()
        for block in self.blocks:
            total += cast(RankMixerBlock, block).flops()
        return total + Flops(elementwise=self.config.num_tokens * self.config.dim)
