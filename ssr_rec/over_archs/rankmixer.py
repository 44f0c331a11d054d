"""RankMixer: parameter-free token mixing, then an FFN of its own for every token (Zhu et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.over_archs.base import GELU_FLOPS, LAYER_NORM_FLOPS, Flops, OverArch, OverArchSettings
from ssr_rec.over_archs.layers import LAYER_NORM_EPS, Dropout, Initializer, InputNormKind, ViewLinear, make_input_norm


class RankMixerConfig(OverArchSettings):
    """RankMixer with dense per-token FFNs (arXiv 2507.15551, section 3)."""

    name: Literal["rankmixer"] = "rankmixer"
    num_tokens: int = Field(default=8, ge=1, description="tokens, and heads of the token mixing (T = H in the paper)")
    dim: int = Field(default=96, ge=1, description="dims of a token (D in the paper), a multiple of num_tokens")
    num_layers: int = Field(default=2, ge=1, description="blocks of token mixing and per-token FFN")
    ffn_ratio: int = Field(default=2, ge=1, description="hidden width of the FFN over dim (k in the paper)")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share dropped after the FFN's activation")
    input_norm: InputNormKind = Field(
        default="none", description="batch norm of the input, per dim, per field or per dim across fields"
    )
    layer_norm_eps: float = Field(default=LAYER_NORM_EPS, gt=0.0, description="added to each token's variance")
    initializer: Initializer = Field(
        default="glorot", description="glorot: Glorot uniform, zero bias; torch: nn.Linear's own; fans of one token"
    )

    @model_validator(mode="after")
    def _heads_divide_the_dim(self) -> RankMixerConfig:
        if self.dim % self.num_tokens:
            raise ValueError(
                f"dim={self.dim} is not divisible by num_tokens={self.num_tokens}: token mixing splits each token "
                f"into num_tokens heads"
            )
        return self

    @property
    def label(self) -> str:
        """Tokens x dims x layers."""
        return f"RankMixer {self.num_tokens}x{self.dim}x{self.num_layers}"


def mix_tokens(x: Tensor) -> Tensor:
    """Head h of every token, in the order of the tokens, becomes token h (section 3.3.1): (T, B, D) -> (T, B, D)."""
    tokens = x.shape[0]
    return x.unflatten(2, (tokens, -1)).permute(2, 1, 0, 3).flatten(2)


class RankMixerBlock(nn.Module):
    """``s = LN(mix(x) + x)``, then ``LN(PFFN(s) + s)`` (eq. 1): (T, B, D) -> (T, B, D), tokens first.

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
    """RankMixer, dense: (B, F*D) -> (B, dim).

    The input vector is cut into ``num_tokens`` pieces of equal width whatever field a dim belongs to, zeros
    filling the last one up; each piece has a dense layer of its own to ``dim`` (section 3.2).

    Raises:
        ValueError: more tokens than the input can fill, so that one of them would be all zeros.
    """

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: RankMixerConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or RankMixerConfig()
        tokens = config.num_tokens
        piece = -(-self.in_features // tokens)
        if (tokens - 1) * piece >= self.in_features:
            raise ValueError(
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
