"""Shows the fields of the input through the first layer of a trained SSR: what its filter lets through of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssr_rec.explaining.rows import SplitRows
from ssr_rec.model.ctr_model import CTRModel
from ssr_rec.over_archs.filters import Filter, IcsFilter, StaticRandomFilter, TopKFilter
from ssr_rec.over_archs.ssr import SSR


def filter_view(model: CTRModel, rows: SplitRows) -> dict[str, Any] | None:
    """Return what the first layer's filter does with every field; None of an over-arch without such a filter.

    Args:
        model: in eval mode.
        rows: what a dynamic filter is seen to work on: the first batch of them.
    """
    over_arch = model.dense.over_arch
    if not isinstance(over_arch, SSR):
        return None
    first = over_arch.blocks()[0].filter
    names, dims = model.dense.field_names, over_arch.field_dims
    if isinstance(first, StaticRandomFilter):
        return static_view(first.indices, names, dims)
    if isinstance(first, (IcsFilter, TopKFilter)):
        return dynamic_view(first, over_arch.prepare(_input(model, rows)), names, dims)
    return None


def static_view(indices: Tensor, names: Sequence[str], dims: Sequence[int]) -> dict[str, Any]:
    """Return how the fixed views of SSR-S cover the fields.

    Args:
        indices: ``(V, d)`` the dims that each view sees, of the F * D of the input.
        names: the fields.
        dims: D of each field.

    Returns:
        ``kind``; ``fields``, entries of ``field``, ``dims``, ``covered`` (share of its dims that some view sees),
        ``views_per_dim`` (how many views see a dim, on average) and ``blind_views`` (views that see none of it);
        ``expected_covered``, what chance gives; ``heat``, for each view the dims of each field that it sees.
    """
    views, width = indices.shape[0], sum(dims)
    seen = torch.zeros(views, width, dtype=torch.bool).scatter_(1, indices.cpu(), True)
    fields, heat = [], []
    for name, part in zip(names, seen.split(list(dims), dim=1), strict=True):
        of_view = part.sum(1)
        heat.append(of_view.tolist())
        fields.append(
            {
                "field": name,
                "dims": part.shape[1],
                "covered": part.any(0).float().mean().item(),
                "views_per_dim": part.sum(0).float().mean().item(),
                "blind_views": int((of_view == 0).sum()),
            }
        )
    expected = 1 - (1 - indices.shape[1] / width) ** views
    by_view = [list(row) for row in zip(*heat, strict=True)]
    return {"kind": "static", "expected_covered": expected, "fields": fields, "heat": by_view}


@torch.inference_mode()
def dynamic_view(first: Filter, x: Tensor, names: Sequence[str], dims: Sequence[int]) -> dict[str, Any]:
    """Return which fields feed the projected dims that survive the competition in SSR-D.

    A view's projected dim is a sum over the fields, ``z = sum_f x_f W_f``. A field's share of a dim of a row is
    ``|x_f W_f|`` over the sum of these over all fields. ``before`` is its mean over all dims and rows, ``after`` that
    over those that ICS (or the top k) left above zero. ``lift``, their ratio, is above 1 of a field that drives
    winners.

    Args:
        first: the filter of the first layer.
        x: ``(B, F*D)`` its input.
        names: the fields.
        dims: D of each field.

    Returns:
        ``kind``; ``fields``, entries of ``field``, ``before``, ``after`` and ``lift``; ``alive``, for each view the
        share of (row, dim) that survive; ``dead_dims``, for each view the dims that never do; ``heat``, for each view
        the ``after`` of each field.
    """
    assert isinstance(first, (IcsFilter, TopKFilter))
    views = first.num_views
    kept = first.sparse(x) if isinstance(first, IcsFilter) else first(x)
    survives = kept != 0
    totals = torch.zeros(x.shape[0], views * first.out_dim, dtype=x.dtype)
    parts = list(zip(x.split(list(dims), 1), first.proj.weight.split(list(dims), 1), strict=True))
    for own, weight in parts:
        totals += (own @ weight.t()).abs()
    shares_before, shares_after = [], []
    for own, weight in parts:
        share = ((own @ weight.t()).abs() / totals.clamp_min(torch.finfo(x.dtype).tiny)).view_as(survives)
        shares_before.append(share.mean((0, 2)))
        shares_after.append((share * survives).sum((0, 2)) / survives.sum((0, 2)).clamp_min(1))
    before, after = torch.stack(shares_before), torch.stack(shares_after)
    counts = survives.sum((0, 2))
    overall = (after * counts).sum(1) / counts.sum().clamp_min(1)
    fields = [
        {"field": name, "before": b, "after": a, "lift": a / b if b else None}
        for name, b, a in zip(names, before.mean(1).tolist(), overall.tolist(), strict=True)
    ]
    return {
        "kind": "dynamic" if isinstance(first, IcsFilter) else "topk",
        "fields": fields,
        "alive": survives.float().mean((0, 2)).tolist(),
        "dead_dims": (~survives.any(0)).sum(1).tolist(),
        "heat": after.t().tolist(),
    }


def _input(model: CTRModel, rows: SplitRows) -> Tensor:
    """Return the input vector (B, F*D) of the first batch."""
    seen: list[Tensor] = []
    handle = model.dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            batch = next(rows.batches())
            model(*batch.inputs)
    finally:
        handle.remove()
    return seen[0]
