"""Defines the views that a layer of SSR has for each domain, beside those that all rows share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.kernels import ics_reference
from ssr_rec.over_archs.base import GELU_FLOPS, LAYER_NORM_FLOPS, Flops
from ssr_rec.over_archs.domain_layers import DomainLinear, DomainRows
from ssr_rec.over_archs.layers import Dropout, init_dense_
from ssr_rec.over_archs.ssr_settings import SSRConfig


class DomainStatic(nn.Module):
    """Filters as SSR-S does, each view of each domain by dims of its own: (B, width) -> (B, V, d).

    The dims depend on ``index_seed``, the layer, the view and the domain's id alone.
    """

    indices: Tensor

    def __init__(self, width: int, layer: int, config: SSRConfig, num_domains: int) -> None:
        super().__init__()
        if config.view_dim > width:
            raise UserError(f"view_dim={config.view_dim} is more than the {width} dims of the input: lower it")
        self.out_dim = config.view_dim

        def drawn(view: int, domain: int) -> np.ndarray:
            seed = np.random.SeedSequence(config.index_seed, spawn_key=(layer, view, domain))
            return np.sort(np.random.default_rng(seed).permutation(width)[: config.view_dim])

        views = range(config.domain_views)
        found = np.stack([[drawn(view, domain) for view in views] for domain in range(num_domains)])
        self.register_buffer("indices", torch.from_numpy(found))

    def forward(self, x: Tensor, rows: DomainRows) -> Tensor:
        return x.gather(1, self.indices.flatten(1)[rows.domains]).unflatten(1, self.indices.shape[1:])

    def flops(self) -> Flops:
        return Flops()


class DomainIcs(nn.Module):
    """Filters as SSR-D does, with projections, alphas and gammas of the row's domain: (B, width) -> (B, V, out_dim)."""

    def __init__(self, width: int, layer: int, config: SSRConfig, num_domains: int) -> None:
        super().__init__()
        self.views, self.iterations = config.domain_views, config.iterations
        self.out_dim = dim = config.filter_dim or config.view_dim

        def projection() -> DomainLinear:
            linear = DomainLinear(num_domains, 1, width, self.views * dim, bias=False)
            init_dense_(linear.weight, None, width, dim, config.initializer, normal=True)
            return linear

        self.proj = projection()
        self.value = projection() if config.gate else None
        alpha = torch.full((num_domains, self.views, config.iterations), float(config.alpha_init))
        self.alpha: Tensor
        if config.learn_alpha:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)
        self.gamma = nn.Parameter(torch.ones(num_domains, self.views, dim)) if config.gamma else None

    def forward(self, x: Tensor, rows: DomainRows) -> Tensor:
        shape = (self.views, self.out_dim)
        z = self.proj(x.unsqueeze(1), rows).flatten(1).unflatten(1, shape)
        # The fast forms have the same alphas in every row.
        h = ics_reference(z, rows.weights(self.alpha), None if self.gamma is None else rows.weights(self.gamma))
        return h if self.value is None else h * self.value(x.unsqueeze(1), rows).flatten(1).unflatten(1, shape)

    def flops(self) -> Flops:
        dims = self.views * self.out_dim
        compete = dims * (1 + 3 * self.iterations + (self.gamma is not None)) + self.views * self.iterations
        total = self.proj.flops() + Flops(elementwise=compete)
        return total if self.value is None else total + self.value.flops() + Flops(elementwise=dims)


DOMAIN_FILTERS: dict[str, type[DomainStatic | DomainIcs]] = {
    "static": DomainStatic,
    # What moves are the dims of the shared views alone.
    "adaptive": DomainStatic,
    "dynamic": DomainIcs,
}


class DomainViews(nn.Module):
    """Filters and fuses with the views of each row's domain: (B, width) -> (B, domain_views, d).

    It computes what a layer's shared views do, in plain operators. The scales and shifts of its LayerNorm begin at
    zero: views of a domain that training has not seen add nothing.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig, num_domains: int) -> None:
        super().__init__()
        views, dim = config.domain_views, config.view_dim
        self.filter = DOMAIN_FILTERS[config.filter](width, layer, config, num_domains)

        def dense(fan_in: int) -> DomainLinear:
            linear = DomainLinear(num_domains, views, fan_in, dim)
            init_dense_(linear.weight, linear.bias, fan_in, dim, config.initializer)
            return linear

        self.dense = dense(self.filter.out_dim)
        self.dense2 = dense(dim) if config.fusion_layers == 2 else None
        self.dropout = Dropout(config.fusion_dropout)
        self.norm_weight = nn.Parameter(torch.zeros(num_domains, views, dim))
        self.norm_bias = nn.Parameter(torch.zeros(num_domains, views, dim))
        self.eps, self.residual = config.layer_norm_eps, config.residual

    def forward(self, x: Tensor, rows: DomainRows) -> Tensor:
        h = self.filter(x, rows)
        z = F.gelu(self.dense(h, rows))
        if self.dense2 is not None:
            z = F.gelu(self.dense2(z, rows))
        z = self.dropout(z)
        if self.residual:
            z = h + z
        z = F.layer_norm(z, z.shape[-1:], eps=self.eps)
        return torch.addcmul(rows.weights(self.norm_bias), z, rows.weights(self.norm_weight))

    def flops(self) -> Flops:
        dims = self.norm_weight[0].numel()
        total = self.filter.flops()
        for dense in (self.dense, self.dense2):
            if dense is not None:
                total += dense.flops() + Flops(elementwise=GELU_FLOPS * dims)
        return total + Flops(elementwise=(LAYER_NORM_FLOPS + self.residual) * dims)
