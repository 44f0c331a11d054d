"""Defines the filters of an SSR layer, which pick, for every view, the signals its dense fusion gets to see.

To add one: a class with the methods of ``Filter``, a name in ``FilterName``, its keys in ``FILTER_KEYS`` and a
line in ``FILTERS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.kernels import ics
from ssr_rec.kernels.reference import gather_views
from ssr_rec.over_archs.base import Flops, dense_flops
from ssr_rec.over_archs.layers import Dropout, init_dense_

if TYPE_CHECKING:
    from ssr_rec.over_archs.ssr_settings import SSRConfig


class Filter(nn.Module, ABC):
    """Makes b views from the whole input (eq. 2): ``(B, width) -> (B, V, out_dim)``.

    Args of every filter: ``width`` of the layer's input, ``layer`` its position in the stack, ``config``.

    Attributes:
        out_dim: dims the fusion of a view gets to see: d, or all of the input where nothing is taken away.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__()
        self.width = width
        self.num_views = config.num_views
        self.view_dim = self.out_dim = config.view_dim

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def flops(self) -> Flops:
        """Return the cost for one sample."""

    @abstractmethod
    def statistics(self, x: Tensor) -> dict[str, Any]:
        """Return what a report says about this filter on the batch x, as JSON values."""


class StaticRandomFilter(Filter):
    """Filters for SSR-S: every view sees a fixed random subset of the dims (eq. 3), by slicing, at no FLOPs.

    The dims are distinct within a view and independent across views and layers. They depend on ``index_seed``, the
    layer and the view alone: not on the run's seed, and not on how many other views there are.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__(width, layer, config)
        if config.view_dim > width:
            raise UserError(
                f"view_dim={config.view_dim} asks each view of layer {layer} for more dims than its input has: "
                f"set view_dim to at most {width}, or filter to dynamic (--over_arch.view_dim={width}, or "
                "--over_arch.filter=dynamic)"
            )
        self.indices: Tensor
        self.register_buffer("indices", random_indices(width, layer, config))

    def forward(self, x: Tensor) -> Tensor:
        return gather_views(x, self.indices)

    def flops(self) -> Flops:
        return Flops()

    def statistics(self, x: Tensor) -> dict[str, Any]:
        return {"input_coverage": self.indices.unique().numel() / self.width}


class AdaptiveFilter(StaticRandomFilter):
    """Filters for SSR-A: as SSR-S, but the dims of its first layer move while it trains (``adaptive.py``).

    A dim that stays keeps its place in its view; so the dims of a view are in no order.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__(width, layer, config)
        if layer == 0 and config.view_dim == width:
            raise UserError(
                f"filter='adaptive' has no dims to move: each view sees all {width} of the input; set view_dim to "
                "less, or filter='static'"
            )
        self.drawn: Tensor
        self.register_buffer("drawn", self.indices.clone(), persistent=False)

    def statistics(self, x: Tensor) -> dict[str, Any]:
        return {**super().statistics(x), "moved": (self.indices != self.drawn).float().mean().item()}


def random_indices(width: int, layer: int, config: SSRConfig) -> Tensor:
    """Return the dims that the views of a layer see, drawn: (V, d)."""
    rows = [random_subset(width, config.view_dim, config.index_seed, layer, v) for v in range(config.num_views)]
    return torch.tensor(np.stack(rows))


def random_subset(width: int, count: int, seed: int, layer: int, view: int) -> np.ndarray:
    """Return ``count`` of ``width`` dims, uniform without replacement, ascending."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(layer, view)))
    return np.sort(rng.permutation(width)[:count])


def projection(width: int, dim: int, config: SSRConfig) -> nn.Linear:
    """Return W_proj of all views as one matrix, for one large product; the fans are those of one view."""
    linear = nn.Linear(width, config.num_views * dim, bias=False)
    init_dense_(linear.weight, None, width, dim, config.initializer, normal=True)
    return linear


class IcsFilter(Filter):
    """Filters for SSR-D: every view projects the whole input and lets the projected dims compete (eq. 4).

    ``h_i = ICS_i(x W_i^proj)``; with ``gate``, ``h_i = ICS_i(x W_i^proj) * (x W_i^value)``. A view's population has
    ``filter_dim`` dims, which its fusion brings to ``view_dim``.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__(width, layer, config)
        self.out_dim = dim = config.filter_dim or config.view_dim
        self.proj = projection(width, dim, config)
        self.value = projection(width, dim, config) if config.gate else None
        alpha = torch.full((self.num_views, config.iterations), float(config.alpha_init))
        self.alpha: Tensor
        if config.learn_alpha:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)
        self.gamma = nn.Parameter(torch.ones(self.num_views, dim)) if config.gamma else None

    def sparse(self, x: Tensor) -> Tensor:
        """Return ICS of the projection, before any gate: (B, width) -> (B, V, out_dim)."""
        return ics(self.proj(x).unflatten(1, (self.num_views, self.out_dim)), self.alpha, self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        h = self.sparse(x)
        return h if self.value is None else h * self.value(x).view_as(h)

    def flops(self) -> Flops:
        dims = self.num_views * self.out_dim
        iterations = self.alpha.shape[1]
        # relu; per iteration a mean, a subtraction and a relu over d, and one alpha * mean a view; gamma.
        compete = dims * (1 + 3 * iterations + (self.gamma is not None)) + self.num_views * iterations
        total = dense_flops(self.width, dims, bias=False) + Flops(elementwise=compete)
        if self.value is not None:
            total += dense_flops(self.width, dims, bias=False) + Flops(elementwise=dims)
        return total

    def statistics(self, x: Tensor) -> dict[str, Any]:
        zeros = self.sparse(x) == 0
        alpha = self.alpha.detach()
        return {
            "sparsity": zeros.float().mean().item(),
            "sparsity_per_view": zeros.float().mean((0, 2)).tolist(),
            "alpha": alpha.tolist(),
            "negative_alphas": int((alpha < 0).sum()),
        }


class TopKFilter(Filter):
    """Takes the top k with a straight-through gradient instead of ICS (paper, Table 4).

    ``h_i`` is ``x W_i^proj`` with all but its ``top_k`` largest dims set to zero; the backward pass takes the
    selection for the identity, so that dims that were cut get a gradient too.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__(width, layer, config)
        self.proj = projection(width, config.view_dim, config)
        self.top_k = config.top_k

    def forward(self, x: Tensor) -> Tensor:
        z = self.proj(x).unflatten(1, (self.num_views, self.view_dim))
        kept = torch.zeros_like(z).scatter(2, z.topk(self.top_k, dim=2).indices, 1.0)
        return z + (z * kept - z).detach()

    def flops(self) -> Flops:
        dims = self.num_views * self.view_dim
        return dense_flops(self.width, dims, bias=False) + Flops(elementwise=dims)

    def statistics(self, x: Tensor) -> dict[str, Any]:
        return {"sparsity": (self(x) == 0).float().mean().item()}


class NoFilter(Filter):
    """Filters nothing: every view's dense fusion sees the whole input (paper, Table 4, "w/o sparse filtering")."""

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__(width, layer, config)
        self.out_dim = width

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, self.num_views, -1)

    def flops(self) -> Flops:
        return Flops()

    def statistics(self, x: Tensor) -> dict[str, Any]:
        return {}


class DropoutFilter(NoFilter):
    """Drops dims at random: every view sees the whole input under a mask of its own (paper, Table 4)."""

    def __init__(self, width: int, layer: int, config: SSRConfig) -> None:
        super().__init__(width, layer, config)
        self.dropout = Dropout(config.filter_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


FILTERS: dict[str, type[Filter]] = {
    "static": StaticRandomFilter,
    "adaptive": AdaptiveFilter,
    "dynamic": IcsFilter,
    "topk": TopKFilter,
    "none": NoFilter,
    "dropout": DropoutFilter,
}
