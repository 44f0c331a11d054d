"""SSR, explicit sparsity for scalable recommendation, filters each view, then fuses it densely, layer on layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ssr_rec.common.errors import UserError
from ssr_rec.kernels import view_fusion
from ssr_rec.kernels.reference import gather_views
from ssr_rec.over_archs.adaptive import Adapts, Ranks, States, look_at, move_dims
from ssr_rec.over_archs.base import GELU_FLOPS, Domain, Flops, OverArch
from ssr_rec.over_archs.domain_layers import DomainRows, domain_rows
from ssr_rec.over_archs.domain_views import DomainViews
from ssr_rec.over_archs.filters import FILTERS, IcsFilter, StaticRandomFilter, TopKFilter
from ssr_rec.over_archs.layers import DenseStack, Dropout, ViewLayerNorm, ViewLinear, evaluating, make_input_norm
from ssr_rec.over_archs.ssr_settings import SSRConfig


class ViewFusion(nn.Module):
    """Fuses densely within each view: ``LN(gelu(h V + c))``, eq. 5 and 6, with the released code's variants.

    With ``residual``, ``LN(h + dropout(gelu(h V + c)))``; with ``fusion_layers=2``,
    ``gelu(gelu(h V1 + c1) V2 + c2)`` instead of one dense layer.
    """

    def __init__(self, fan_in: int, config: SSRConfig) -> None:
        super().__init__()
        views, dim = config.num_views, config.view_dim
        self.dense = ViewLinear(views, fan_in, dim, config.initializer)
        self.dense2 = ViewLinear(views, dim, dim, config.initializer) if config.fusion_layers == 2 else None
        self.dropout = Dropout(config.fusion_dropout)
        self.norm = ViewLayerNorm(views, dim, config.layer_norm_eps)
        self.residual = config.residual

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Map (B, V, fan_in), or (B, width) with the dims (V, fan_in) that the views see, to (B, V, d)."""
        residual = None
        if self.residual:
            residual = x = x if indices is None else gather_views(x, indices)
            indices = None
        if self.dense2 is not None:
            x, indices = view_fusion(x, indices, self.dense.weight, self.dense.bias), None
        last = self.dense if self.dense2 is None else self.dense2
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        if not (self.training and self.dropout.p):
            return view_fusion(x, indices, last.weight, last.bias, residual, *norm)
        kept = self.dropout.draw((x.shape[0], *self.norm.weight.shape), x.device)
        return view_fusion(x, indices, last.weight, last.bias, residual, *norm, *kept)

    def flops(self) -> Flops:
        dims = self.norm.weight.numel()
        one_dense = self.dense.flops() + Flops(elementwise=GELU_FLOPS * dims)
        total = one_dense
        if self.dense2 is not None:
            total += self.dense2.flops() + Flops(elementwise=GELU_FLOPS * dims)
        return total + self.norm.flops() + Flops(elementwise=dims if self.residual else 0)


class SSRLayer(nn.Module):
    """Filter, then fuse: (B, width) -> (B, V, d), where a domain has views of its own those last.

    The parts of a domain are named by its column, so that a warm start can tell what their first dim stands for.
    """

    def __init__(self, width: int, layer: int, config: SSRConfig, domain: Domain | None = None) -> None:
        super().__init__()
        self.filter = FILTERS[config.filter](width, layer, config)
        self.fusion = ViewFusion(self.filter.out_dim, config)
        self.per_domain: nn.ModuleDict | None = None
        if domain is not None:
            self.per_domain = nn.ModuleDict({domain.name: DomainViews(width, layer, config, domain.size)})

    def forward(self, x: Tensor, rows: DomainRows | None = None) -> Tensor:
        if isinstance(self.filter, StaticRandomFilter):
            views = self.fusion(x, self.filter.indices)
        else:
            views = self.fusion(self.filter(x))
        return self.with_domain_views(views, x, rows)

    def with_domain_views(self, views: Tensor, x: Tensor, rows: DomainRows | None) -> Tensor:
        """Return the shared views (B, V, d) of the layer's input x with those of the rows' domains."""
        for of_domain in self.per_domain.values() if self.per_domain is not None else ():
            views = torch.cat([views, of_domain(x, rows)], 1)
        return views

    def flops(self) -> Flops:
        total = self.filter.flops() + self.fusion.flops()
        for of_domain in self.per_domain.values() if self.per_domain is not None else ():
            total += cast(DomainViews, of_domain).flops()
        return total


class SSR(OverArch):
    """Computes SSR-S and SSR-D: one block, two filters (paper, section 2); and SSR-A, SSR-S whose dims move at first.

    (B, F*D) -> (B, V*d); (B, d) with ``output='mean'``; (B, output_mlp[-1]) with an output MLP. With ``domain_views``
    it takes the rows' domains (B,) as well, and V are the shared views and those of one domain.
    """

    takes_domain: ClassVar[bool] = True

    def __init__(
        self,
        num_fields: int,
        embedding_dim: int | Sequence[int],
        num_tasks: int,
        config: SSRConfig | None = None,
        domain: Domain | None = None,
    ) -> None:
        super().__init__(num_fields, embedding_dim, num_tasks)
        self.config = config = config or SSRConfig()
        if config.domain_views and domain is None:
            raise UserError(f"domain_views={config.domain_views} needs a domain, the column whose values they are of")
        self.domain = domain if config.domain_views else None
        wide = (config.num_views + config.domain_views) * config.view_dim
        self.input_norm = make_input_norm(config.input_norm, self.field_dims)
        self.input_dropout = Dropout(config.input_dropout)
        self.layers = nn.ModuleList(
            SSRLayer(self.in_features if i == 0 else wide, i, config, self.domain) for i in range(config.num_layers)
        )
        self.out_features = wide if config.output == "concat" else config.view_dim
        self.output_mlp = DenseStack(self.out_features, config.output_mlp, config.initializer)
        if config.output_mlp:
            self.out_features = config.output_mlp[-1]
        if config.filter == "adaptive":
            # Of each field: the sums over the batches of what the loss would rise by, and of its squares; is it closed?
            self.register_buffer("gates", torch.zeros(3, len(self.field_dims)))

    def blocks(self) -> list[SSRLayer]:
        """Return the layers, first to last."""
        return [cast(SSRLayer, layer) for layer in self.layers]

    def prepare(self, x: Tensor) -> Tensor:
        """Return what the first layer sees of the input: (B, F*D) -> (B, F*D)."""
        x = self.input_norm(x)
        return self.input_dropout(x)

    def rows_of(self, domain: Tensor | None) -> list[DomainRows]:
        """Return what every layer takes besides x: the domains (B,) of the rows, or nothing."""
        return [domain_rows(domain, self.domain.size)] if self.domain is not None and domain is not None else []

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        rows = self.rows_of(domain)
        x = self.prepare(x)
        for layer in self.layers[:-1]:
            x = layer(x, *rows).flatten(1)
        return self.output(self.layers[-1](x, *rows))

    def output(self, views: Tensor) -> Tensor:
        """Return the features of the last layer's views: (B, V, d) -> (B, H)."""
        return self.output_mlp(views.mean(1) if self.config.output == "mean" else views.flatten(1))

    def adapts(self) -> Adapts | None:
        config = self.config
        if config.filter != "adaptive":
            return None
        return Adapts(config.adapt_every, config.adapt_until)

    def look(self, x: Tensor, grad: Tensor, ranks: Ranks) -> None:
        look_at(self, x, grad, ranks)

    def adapt(self, step: int, states: States, ranks: Ranks) -> None:
        move_dims(self, step, states, ranks)

    def forget_looks(self) -> None:
        if self.config.filter == "adaptive":
            self.get_buffer("gates")[:2] = 0

    def sparse_filters(self) -> list[nn.Module]:
        return [layer.filter for layer in self.blocks() if isinstance(layer.filter, IcsFilter | TopKFilter)]

    def statistics(self, x: Tensor, field_names: Sequence[str], domain: Tensor | None = None) -> dict[str, Any]:
        filters = ssr_statistics(self, x, domain)
        if self.config.filter == "adaptive":
            closed = self.get_buffer("gates")[2].tolist()
            filters["closed_fields"] = [name for name, shut in zip(field_names, closed, strict=True) if shut]
        return {"filters": filters}

    def flops(self) -> Flops:
        total = self.input_norm.flops()
        for layer in self.blocks():
            total += layer.flops()
        if self.config.output == "mean":
            total += Flops(elementwise=(self.config.num_views + self.config.domain_views) * self.config.view_dim)
        return total + self.output_mlp.flops()


@torch.no_grad()
def ssr_statistics(ssr: SSR, x: Tensor, domain: Tensor | None = None) -> dict[str, Any]:
    """Return what each layer's filter does on the batch x (B, F*D), as JSON values; the model is left as it was.

    It is of the views that all rows share; ``domain`` (B,) is for a model that has others, too.

    SSR-D: the share of exact zeros after ICS, overall and per view, and the (V, T) alphas with the
    number of negative ones. SSR-S: the share of the layer's input dims that any view sees.
    """
    with evaluating(ssr):
        layers, x = [], ssr.prepare(x)
        for layer in ssr.blocks():
            layers.append(layer.filter.statistics(x))
            x = layer(x, *ssr.rows_of(domain)).flatten(1)
    return {"filter": ssr.config.filter, "layers": layers}
