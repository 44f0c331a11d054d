"""AutoFIS searches the pairs of fields whose product matters, then trains a DeepFM of these pairs alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.autofis_settings import GRDA_KEYS, AutoFISConfig
from ssr_rec.over_archs.base import FOLDED_NORM_FLOPS, Flops, OverArch, equal_dim
from ssr_rec.over_archs.grda import GRDA
from ssr_rec.over_archs.layers import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, DenseStack, make_input_norm

ALPHA_SPREAD = 1e-3
"""Released code: alphas start uniform in ``alpha_init`` plus or minus this."""
GRAM_ENTRIES_PER_PAIR = 16
"""A gathered pair takes about the time of so many entries of the Gram matrix; docs/over_archs.md has figures."""


class PairProducts(nn.Module):
    """Computes inner products of pairs of fields: (B, F, D) -> (B, P).

    Many pairs are read off the Gram matrix of all fields, (B, F, F). Few are gathered and multiplied, at a cost in
    time and memory of P * D per sample, which for all pairs is about D / 2 times the Gram matrix.
    """

    def __init__(self, num_fields: int, dim: int, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.num_fields, self.dim, self.num_pairs = num_fields, dim, len(pairs)
        self.gram = GRAM_ENTRIES_PER_PAIR * len(pairs) >= num_fields**2
        left, right = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        self.left: Tensor
        self.right: Tensor
        self.cell: Tensor
        # Rebuilt from the config, so no part of the state.
        self.register_buffer("left", left.clone(), persistent=False)
        self.register_buffer("right", right.clone(), persistent=False)
        self.register_buffer("cell", left * num_fields + right, persistent=False)

    def forward(self, e: Tensor) -> Tensor:
        if self.gram:
            return torch.bmm(e, e.transpose(1, 2)).flatten(1).index_select(1, self.cell)
        return (e.index_select(1, self.left) * e.index_select(1, self.right)).sum(2)

    def flops(self) -> Flops:
        if self.gram:
            return Flops(matmul=2 * self.num_fields**2 * self.dim)
        return Flops(elementwise=2 * self.num_pairs * self.dim)


class PairNorm(nn.Module):
    """Applies batch norm to every pair's product, without scale and shift: (B, P) -> (B, P).

    Without it a small alpha and large embeddings would do the same as a large alpha and small embeddings, so alpha
    would say nothing about a pair's importance (AutoFIS, search stage).
    """

    def __init__(self, num_pairs: int) -> None:
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_pairs))
        self.register_buffer("running_var", torch.ones(num_pairs))

    def forward(self, products: Tensor) -> Tensor:
        return F.batch_norm(
            products,
            self.running_mean,
            self.running_var,
            # One row has no variance; the last batch of an epoch may be one.
            training=self.training and products.shape[0] > 1,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )

    def flops(self) -> Flops:
        return Flops(elementwise=FOLDED_NORM_FLOPS * self.running_mean.numel())


class AutoFIS(OverArch):
    """Computes AutoDeepFM (Liu et al., "AutoFIS", KDD 2020): ``first order + sum of alpha_ij BN(<e_i, e_j>) + deep``.

    (B, F*D), first order (B, F*T) -> deep features (B, hidden[-1]), logits (B, T) of first order and pairs.

    The search (``pairs`` None) has all pairs; its alphas are gates, trained by GRDA, which makes those of useless
    pairs zero. ``following_config`` then has the survivors, and alphas that the run's optimizer trains from
    ``alpha_init`` on. All tasks share the alphas, hence the selection; with more than one task, each scales the sum.

    Raises:
        UserError: fields of different dims, or a pair with a field that is not there.
    """

    task_parts = ("first_order", "task_scale")

    def __init__(
        self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int, config: AutoFISConfig | None = None
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or AutoFISConfig()
        dim = equal_dim(self, "AutoFIS")
        for i, j in config.pairs or []:
            if j >= num_fields:
                raise UserError(f"pairs has [{i}, {j}], but the last of the {num_fields} fields is {num_fields - 1}")
        every_pair = list(itertools.combinations(range(num_fields), 2))
        self.pairs: list[tuple[int, int]] = every_pair if config.pairs is None else list(config.pairs)
        self.extra_tables = {"first_order": (num_tasks,) * num_fields}

        self.products = PairProducts(num_fields, dim, self.pairs)
        self.pair_norm = PairNorm(len(self.pairs))
        self.alpha: nn.Parameter | None = None
        self.task_scale: nn.Parameter | None = None
        if self.pairs:
            self.alpha = nn.Parameter(torch.empty(len(self.pairs)))
            nn.init.uniform_(self.alpha, config.alpha_init - ALPHA_SPREAD, config.alpha_init + ALPHA_SPREAD)
            self.task_scale = nn.Parameter(torch.ones(num_tasks)) if num_tasks > 1 else None
            if config.pairs is None:
                self.optimizers = {"alpha": partial(GRDA, lr=config.grda_lr, c=config.grda_c, mu=config.grda_mu)}

        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.deep = DenseStack(
            self.in_features,
            config.hidden,
            config.initializer,
            layer_norm=config.layer_norm,
            dropout=config.dropout,
        )
        self.out_features = config.hidden[-1]

    def forward(self, x: Tensor, first_order: Tensor) -> tuple[Tensor, Tensor]:
        logits = first_order.unflatten(1, (-1, self.num_tasks)).sum(1)
        if self.alpha is not None:
            logits = logits + self._interactions(x, self.alpha)
        x = self.input_norm(x)
        return self.deep(x), logits

    def _interactions(self, x: Tensor, alpha: Tensor) -> Tensor:
        """Map (B, F*D) to (B, 1), or (B, T) where tasks have scales."""
        # BN subtracts a mean that may be much larger than the spread around it: more than bfloat16 can resolve.
        with torch.autocast(x.device.type, enabled=False):
            e = x.to(alpha.dtype).unflatten(1, (-1, self.products.dim))
            weighted = self.pair_norm(self.products(e)) @ alpha.unsqueeze(1)
            return weighted if self.task_scale is None else weighted * self.task_scale

    def flops(self) -> Flops:
        total = self.deep.flops() + Flops(elementwise=len(self.field_dims) * self.num_tasks)
        total += self.input_norm.flops()
        if self.alpha is not None:
            total += self.products.flops() + self.pair_norm.flops() + Flops(matmul=2 * len(self.pairs))
            total += Flops(elementwise=self.num_tasks * (1 if self.task_scale is None else 2))
        return total

    def alphas(self) -> list[tuple[int, int, float]]:
        """Return (i, j, alpha) of every pair; an alpha of exactly 0 is a closed gate."""
        values = [] if self.alpha is None else self.alpha.tolist()
        return [(i, j, value) for (i, j), value in zip(self.pairs, values, strict=True)]

    def following_config(self) -> AutoFISConfig | None:
        """Return the second stage's config after a search: the pairs whose gates are open. None after that stage."""
        if self.config.pairs is not None:
            return None
        survivors = [(i, j) for i, j, value in self.alphas() if value != 0]
        return AutoFISConfig(**{**self.config.model_dump(exclude=set(GRDA_KEYS)), "pairs": survivors})

    def interaction_summary(self) -> dict[str, Any]:
        """Return, as JSON values, the stage, the number of pairs and survivors, and ``[i, j, alpha]`` of each pair."""
        alphas = self.alphas()
        return {
            "stage": "search" if self.config.pairs is None else "retrain",
            "pairs": len(alphas),
            "survivors": sum(value != 0 for *_, value in alphas),
            "alphas": [[i, j, value] for i, j, value in alphas],
        }

    def statistics(self, x: Tensor, field_names: Sequence[str]) -> dict[str, Any]:
        named = [[field_names[i], field_names[j], value] for i, j, value in self.alphas()]
        return {"interactions": {**self.interaction_summary(), "alphas": named}}
