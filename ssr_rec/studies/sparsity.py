"""Measures how sparse a trained over-arch is: the paper's Figures 1 and 6, and the overlap of what views pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssr_rec.over_archs.base import OverArch
from ssr_rec.over_archs.filters import IcsFilter, StaticRandomFilter
from ssr_rec.over_archs.ssr import SSR

NEAR_ZERO = 1e-3
"""Below it a weight is near zero (the paper's Figure 1, left)."""
MOST = 0.8
"""Share of the weights' mass that the fewest dims are counted for (Figure 1, right)."""


def weight_figures(weight: Tensor) -> dict[str, float]:
    """Return what Figure 1 says of a dense layer.

    Args:
        weight: (fan_out, fan_in), finite.

    Returns:
        ``near_zero``: share of weights below ``NEAR_ZERO`` in size; ``mass_dims`` and ``power_dims``: the least share
        of input dims that holds ``MOST`` of the sum of absolute, and of squared, weights. A layer in which all dims
        count alike has ``MOST`` for both.
    """
    size = weight.detach().double().abs()
    return {
        "near_zero": (size < NEAR_ZERO).double().mean().item(),
        "mass_dims": _least_share(size.sum(0)),
        "power_dims": _least_share(size.square().sum(0)),
    }


def cumulative(mass: Tensor) -> Tensor:
    """Return the share of ``mass`` (D,) that the heaviest 1, 2, .. D dims hold: (D,)."""
    held = mass.sort(descending=True).values.cumsum(0)
    return held / held[-1].clamp_min(torch.finfo(held.dtype).tiny)


def _least_share(mass: Tensor) -> float:
    # Rounding may leave the sum of the dims that hold exactly MOST a last bit below it.
    return min(int((cumulative(mass) < MOST - 1e-12).sum()) + 1, mass.numel()) / mass.numel()


def dense_layers(over_arch: OverArch) -> dict[str, Tensor]:
    """Return name -> weight (fan_out, fan_in) of every dense layer, in the order of the module."""
    return {name: m.weight for name, m in over_arch.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def view_figures(over_arch: SSR, x: Tensor, domain: Tensor | None = None) -> list[dict[str, Any]]:
    """Return, layer by layer, how alike the views of SSR are; [] for filters without views to compare.

    Args:
        x: the over-arch's input (B, sum of field dims); the model must be in eval mode.
        domain: the rows' domains (B,), where it has views of theirs, which are not compared.

    Returns:
        of SSR-D ``cosine`` (V, V), of the views' projections as vectors (Figure 6), and ``overlap`` (V, V), the mean
        over the rows of the correlation of the sizes of the weights behind what survives of two views: 1 where the
        same input dims pass, 0 where they have nothing to do with each other. Of SSR-S ``overlap``, the Jaccard index
        of two views' dims. ``mean_*`` leave out the diagonal; of one view they are None.
    """
    found = []
    x = over_arch.prepare(x)
    for layer in over_arch.blocks():
        if isinstance(layer.filter, IcsFilter):
            weight = layer.filter.proj.weight.unflatten(0, (layer.filter.num_views, -1))
            alike = {"cosine": _cosine(weight.flatten(1)), "overlap": _overlap(layer.filter.sparse(x), weight)}
        elif isinstance(layer.filter, StaticRandomFilter):
            alike = {"overlap": _jaccard(layer.filter.indices, layer.filter.width)}
        else:
            return []
        found.append({**alike, **{f"mean_{name}": _off_diagonal(value) for name, value in alike.items()}})
        x = layer(x, *over_arch.rows_of(domain)).flatten(1)
    return found


def _cosine(vectors: Tensor) -> Tensor:
    unit = nn.functional.normalize(vectors.double(), dim=1)
    return unit @ unit.T


def _overlap(survived: Tensor, weight: Tensor) -> Tensor:
    """Return the rows' mean correlation of ``sum over survivors |W|``: (B, V, d), (V, d, width) -> (V, V)."""
    behind = torch.einsum("bvd,vdw->bvw", (survived != 0).to(weight.dtype), weight.abs())
    centred = nn.functional.normalize(behind - behind.mean(2, keepdim=True), dim=2)
    return torch.einsum("bvw,buw->vu", centred, centred).double() / len(behind)


def _jaccard(indices: Tensor, width: int) -> Tensor:
    seen = torch.zeros(len(indices), width, dtype=torch.float64).scatter(1, indices, 1.0)
    both = seen @ seen.T
    return both / (2 * indices.shape[1] - both)


def _off_diagonal(matrix: Tensor) -> float | None:
    views = len(matrix)
    return None if views == 1 else ((matrix.sum() - matrix.trace()) / (views * (views - 1))).item()


def sparsity_table(layers: Sequence[dict[str, Any]], views: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of dense layers and one of the views of each layer, where there are any."""
    tables = []
    if layers:
        names = f"weights below {NEAR_ZERO:g} | inputs with {MOST:.0%} of the weights' mass | of their power"
        lines = [f"| dense layer | inputs x outputs | {names} |", "|---|--:|--:|--:|--:|"]
        for row in layers:
            shares = " | ".join(f"{row[name]:.1%}" for name in ("near_zero", "mass_dims", "power_dims"))
            lines.append(f"| {row['name']} | {row['inputs']} x {row['outputs']} | {shares} |")
        tables.append("\n".join(lines))
    if views:
        lines = ["| layer of views | mean cosine of projections | mean overlap of what passes |", "|---|--:|--:|"]
        for number, row in enumerate(views, start=1):
            cells = [_shown(row.get(name)) for name in ("mean_cosine", "mean_overlap")]
            lines.append(f"| {number} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
