"""Moves the rows of tables that bags have looked up, as FBGEMM does in the backward pass.

FBGEMM has no Adam on CPUs, and its row-wise Adagrad there takes two to three times what these take
(``tools/bench_tables.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssr_rec.kernels.devices import has_operators


class LookedUp(NamedTuple):
    """Holds what the bags of a batch have looked up, feature after feature.

    Attributes:
        tables: (F,) int64, where in the weights the table of each feature begins; features of one table follow one
            another.
        columns: (F + 1,) int32, where in the gradient a feature's columns begin.
        ids: (N,) int32 or int64, rows of the tables.
        offsets: (F B + 1,) of the same type, where the ids of each bag begin.
        id_weights: (N,) float32, or None: each weighs 1.
        mean: whether a bag is the mean of its rows, and not their sum.
    """

    tables: Tensor
    columns: Tensor
    ids: Tensor
    offsets: Tensor
    id_weights: Tensor | None
    mean: bool


class AdamSettings(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@torch.no_grad()
def bag_adam(
    weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, bags: LookedUp, settings: AdamSettings, t: int
) -> None:
    """Move every row that was looked up, once, by its gradient g, the sum over its places in the bags::

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

    That is Adam (Kingma and Ba, 2015) as FBGEMM's ``EmbOptimType.ADAM`` has it: t counts all steps, the decay is
    decoupled, and other rows and their moments stay as they are. Neither threads nor vectors decide the order of a sum.

    Args:
        weights: (sum of rows x dim over the tables,) float32; ``exp_avg`` and ``exp_avg_sq``, m and v, are like it.
        grad: (B, columns[F]), of the bags.
        t: this step, from 1 on.
    """
    if has_operators("cpu"):
        torch.ops.ssr_rec.bag_adam(weights, exp_avg, exp_avg_sq, grad, *bags, list(settings), t)
        return
    lr, beta1, beta2, eps, decay = settings
    for _, _, at, g in _gradients(grad, bags):
        m, v = exp_avg[at] * beta1 + g * (1 - beta1), exp_avg_sq[at] * beta2 + g * g * (1 - beta2)
        exp_avg[at], exp_avg_sq[at] = m, v
        moved = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + decay * weights[at]
        weights[at] -= lr * moved


@torch.no_grad()
def bag_rowwise_adagrad(
    weights: Tensor, sums: Tensor, grad: Tensor, bags: LookedUp, sums_tables: Tensor, lr: float, eps: float
) -> None:
    """Move every row that was looked up, once, by its gradient g of D columns, the sum over its places in the bags::

        s += sum(g^2) / D,  w -= lr g / (sqrt(s) + eps)

    That is FBGEMM's ``EmbOptimType.EXACT_ROWWISE_ADAGRAD`` without decay.

    Args:
        weights: as ``bag_adam``; ``grad`` likewise.
        sums: (sum of rows over the tables,) float32, s of each row.
        sums_tables: (F,) int64, where in the sums the table of each feature begins.
    """
    if has_operators("cpu"):
        torch.ops.ssr_rec.bag_rowwise_adagrad(weights, sums, grad, *bags, sums_tables, lr, eps)
        return
    for feature, rows, at, g in _gradients(grad, bags):
        own = sums_tables[feature] + rows
        sums[own] += g.square().mean(1)
        weights[at] -= lr * g / (sums[own].sqrt() + eps)[:, None]


def _gradients(grad: Tensor, bags: LookedUp) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield of each table its first feature, distinct rows (n,), their places in the weights and gradients (n, D)."""
    batch = grad.shape[0]
    lengths = bags.offsets.diff()
    bag = torch.repeat_interleave(lengths)
    share = torch.ones_like(bag, dtype=torch.float32) if bags.id_weights is None else bags.id_weights
    share = share / lengths[bag] if bags.mean else share
    starts, columns = bags.tables.tolist(), bags.columns.tolist()
    for start in dict.fromkeys(starts):
        features = [feature for feature, own in enumerate(starts) if own == start]
        dim = columns[features[0] + 1] - columns[features[0]]
        of_bags = torch.cat([grad[:, columns[feature] : columns[feature + 1]] for feature in features])
        first, last = (int(bags.offsets[feature * batch]) for feature in (features[0], features[-1] + 1))
        rows, places = bags.ids[first:last].long().unique(return_inverse=True)
        wanted = of_bags[bag[first:last] - features[0] * batch] * share[first:last, None]
        g = torch.zeros(len(rows), dim).index_add_(0, places, wanted)
        yield features[0], rows, start + rows[:, None] * dim + torch.arange(dim), g
