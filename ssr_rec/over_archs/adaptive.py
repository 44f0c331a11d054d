"""Moves the dims that the views of SSR-A see while it trains: which go, which come, and what is kept of a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssr_rec.over_archs.layers import InputNorm, evaluating
from ssr_rec.over_archs.ssr_settings import SSRConfig

if TYPE_CHECKING:
    from ssr_rec.over_archs.ssr import SSR

States = Callable[[nn.Parameter], Mapping[str, Tensor]]
"""Gives a parameter's optimizer state, name -> tensor, to be changed in place."""
SECOND_MOMENT = "exp_avg_sq"
"""Adam's name for the mean of squared gradients."""


class Adapts(NamedTuple):
    """Says when an over-arch adapts: every so many steps, until a step, having looked at the last batches before."""

    every: int
    until: int
    batches: int


class Ranks(Protocol):
    """Joins what the ranks of a job have. Both change a tensor in place and are collective."""

    def add(self, tensor: Tensor) -> None:
        """Add up the tensors of all ranks."""

    def take_first(self, tensor: Tensor) -> None:
        """Give every rank the tensor of rank 0."""


def count_at(step: int, config: SSRConfig) -> int:
    """Return how many dims a view exchanges after a step (from 1): a share that falls linearly from ``adapt_share``."""
    left = 1 - max(0, step - config.adapt_every) / config.adapt_until
    return round(max(0.0, left) * config.adapt_share * config.view_dim)


@torch.enable_grad()
def first_products(ssr: SSR, x: Tensor, grad: Tensor, domain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what the first layer sees (B, F*D), and the gradient of its first product before GELU (V, B, d).

    The forward pass is done again, without dropout; running statistics and random states stay as they were.

    Args:
        x: (B, F*D) the over-arch's input.
        grad: (B, H) the gradient of its output.
        domain: (B,) the rows' domains, where it has views of theirs.
    """
    norm = ssr.input_norm
    if isinstance(norm, InputNorm):
        kept, norm.momentum = norm.momentum, 0.0
        seen = norm(x).detach()
        norm.momentum = kept
    else:
        seen = x
    first, *rest = ssr.blocks()
    with evaluating(ssr):
        product, views = first.fusion.plain(seen, first.filter.get_buffer("indices"))
        rows = ssr.rows_of(domain)
        views = first.with_domain_views(views, seen, rows[0] if rows else None)
        for layer in rest:
            views = layer(views.flatten(1), *rows)
        features = ssr.output(views)
    (of_product,) = torch.autograd.grad(features, product, grad.to(features.dtype))
    return seen, of_product


def moved(indices: Tensor, use: Tensor, gain: Tensor, count: int, spread: float, first: int) -> Tensor:
    """Return which dims the views see when each exchanges ``count`` of them: (V, N). What stays keeps its place.

    View after view, from ``first`` on, a view gives up the dims of the least use and takes those of the largest gain
    that it did not have. The gain of a dim that n views hold by then is divided by ``1 + spread * n``. Of equals the
    first is taken.

    Args:
        indices: (V, N) the dims now.
        use: (V, N) of each of them.
        gain: (V, width) of each dim of the input.
    """
    found, use, gain = indices.cpu().clone(), use.double().cpu(), gain.double().cpu()
    views, width = gain.shape
    held = torch.bincount(found.flatten(), minlength=width)
    for view in ((first + i) % views for i in range(views)):
        places = use[view].argsort(stable=True)[:count]
        wanted = gain[view] / (1 + spread * held)
        wanted[found[view]] = -1.0
        come = wanted.argsort(descending=True, stable=True)[:count]
        held[found[view, places]] -= 1
        held[come] += 1
        found[view, places] = come
    return found.to(indices.device)


def forget(weight: Tensor, states: Mapping[str, Tensor], changed: Tensor) -> None:
    """Let the rows of exchanged dims begin anew in place, from zero, as do their momenta and averages.

    Their second moments begin at the mean over the rows that stay: from zero, a first step would be three times as long
    as the rate says.

    Args:
        weight: (V, N, d).
        states: of its optimizer.
        changed: (V, N) bool.
    """
    stays = (~changed).unsqueeze(2)
    weight.mul_(stays)
    for name, value in states.items():
        if value.shape != weight.shape:
            continue
        value.mul_(stays)
        if name == SECOND_MOMENT:
            mean = value.sum(1, keepdim=True) / stays.sum(1, keepdim=True).clamp_min(1)
            value.add_(mean * ~stays)


@torch.no_grad()
def add_would_be(ssr: SSR, x: Tensor, grad: Tensor, ranks: Ranks, domain: Tensor | None = None) -> None:
    """Add a batch's would-be gradients to those the next exchange looks at. Collective.

    Args:
        x: (B, F*D) the over-arch's input.
        grad: (B, H) the gradient of its output.
        domain: (B,) the rows' domains, where it has views of theirs.
    """
    seen, of_product = first_products(ssr, x, grad, domain)
    sums = torch.cat([torch.einsum("bw,vbd->vwd", seen, of_product).flatten(), seen.square().sum(0)])
    ranks.add(sums)
    looked_at = ssr.blocks()[0].filter
    would_be, squares = looked_at.get_buffer("would_be"), looked_at.get_buffer("squares")
    would_be += sums[: would_be.numel()].view_as(would_be)
    squares += sums[would_be.numel() :]


@torch.no_grad()
def move_dims(ssr: SSR, step: int, states: States, ranks: Ranks) -> None:
    """Exchange dims of the first layer's views after a step, by the would-be gradients so far. Collective.

    A dim's use is the norm of its weights. Its gain is the norm of the gradient that its weights got, or would have got
    at zero, over the root mean square of the dim: rare ids have small embeddings, and are no less worth for it.
    """
    config, first = ssr.config, ssr.blocks()[0]
    weight, indices = first.fusion.dense.weight, first.filter.get_buffer("indices")
    would_be, squares = first.filter.get_buffer("would_be"), first.filter.get_buffer("squares")
    if not squares.any():  # every batch was left out
        return
    gain = would_be.norm(dim=2) / squares.sqrt().clamp_min(torch.finfo(squares.dtype).tiny)
    count = min(count_at(step, config), first.filter.width - config.view_dim)
    turn = step // config.adapt_every % config.num_views
    now = moved(indices, weight.norm(dim=2), gain, count, config.adapt_spread, turn)
    # Norms may differ in the last bit between machines of different kinds.
    ranks.take_first(now)
    forget(weight, states(weight), now != indices)
    indices.copy_(now)
    ssr.forget_looks()
