"""Moves the dims that the views of SSR-A see while it trains: which go, which come, and what is kept of a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ssr_rec.over_archs.ssr import SSR

States = Callable[[nn.Parameter], Mapping[str, Tensor]]
"""Gives a parameter's optimizer state, name -> tensor, to be changed in place."""
SECOND_MOMENT = "exp_avg_sq"
"""Adam's name for the mean of squared gradients."""


class Adapts(NamedTuple):
    """Says when an over-arch adapts: every so many steps, until a step, having looked at all batches until then.

    But for those of the first interval, when all the model does is to begin.
    """

    every: int
    until: int


class Ranks(Protocol):
    """Joins what the ranks of a job have. Both change a tensor in place and are collective."""

    def add(self, tensor: Tensor) -> None:
        """Add up the tensors of all ranks."""

    def take_first(self, tensor: Tensor) -> None:
        """Give every rank the tensor of rank 0."""


def rises(x: Tensor, grad: Tensor, field_dims: Sequence[int]) -> Tensor:
    """Return by how much a batch's loss would rise without each field, to second order: (F,).

    Take a gate before a field, a number that is 1 and multiplies its dims. The loss of row i, of B in the mean, changes
    with it by ``u_i = B sum(grad_i x_i)`` over the dims. Its second derivative is the mean of ``u_i**2`` where
    probabilities are calibrated (the Fisher information), so that closing the gate adds
    ``mean(u_i**2) / 2 - mean(u_i)`` to the loss, as Optimal Brain Damage estimates it for weights (LeCun et al. 1989).
    docs/over_archs.md says for which losses the first term is off.

    Args:
        x: (B, sum of field dims) the fields.
        grad: the same shape, the gradient for them of the loss, a mean over the rows.
        field_dims: (F) of each field.
    """
    slopes = torch.stack([part.sum(1) for part in (grad.float() * x.float()).split(list(field_dims), 1)], 1)
    return len(x) / 2 * slopes.square().sum(0) - slopes.sum(0)


def signals(sums: Tensor) -> Tensor:
    """Return by how many standard errors the loss would rise without each field: (2, F) -> (F,).

    Each batch is one observation: its rows share the weights, and of a field with few ids also the embeddings, so they
    err together.

    Args:
        sums: over the batches, of the rises and of their squares.
    """
    return sums[0] / sums[1].sqrt().clamp_min(torch.finfo(sums.dtype).tiny)


def moved(indices: Tensor, signal: Tensor, closed: Tensor, generator: torch.Generator) -> Tensor:
    """Return which dims the views see when each gives up the closed ones: (V, N).

    View after view, the dims of the lowest signal go first. Of those that are open and that the view does not have come
    those that the fewest views hold; of equals the generator chooses. As many go as can come, and what stays keeps its
    place.

    Args:
        indices: (V, N) the dims now.
        signal: (width,) of each dim of the input.
        closed: (width,) bool.
    """
    found, signal, closed = indices.cpu().clone(), signal.cpu(), closed.cpu()
    held = torch.bincount(found.flatten(), minlength=len(signal)).double()
    for view in found:
        goes = closed[view].nonzero().flatten()
        places = goes[signal[view[goes]].argsort(stable=True)]
        free = ~closed
        free[view] = False
        come = free.nonzero().flatten()
        lots = torch.rand(len(come), generator=generator, dtype=torch.float64)
        come = come[(held[come] + lots).argsort()][: len(places)]
        places = places[: len(come)]
        held[view[places]] -= 1
        held[come] += 1
        view[places] = come
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
def look_at(ssr: SSR, x: Tensor, grad: Tensor, ranks: Ranks) -> None:
    """Add a batch to what the next exchange rests on. Collective.

    Args:
        x: (B, sum of field dims) the over-arch's input.
        grad: its gradient.
    """
    found = rises(x, grad, ssr.field_dims)
    ranks.add(found)
    if found.isfinite().all():
        ssr.get_buffer("gates")[:2] += torch.stack([found, found.square()])


@torch.no_grad()
def move_dims(ssr: SSR, step: int, states: States, ranks: Ranks) -> None:
    """Exchange dims of the first layer's views after a step, by all batches looked at so far. Collective.

    A field that was closed once stays so: no view sees it any more, so that nothing new is known of it.
    """
    config, first, gates = ssr.config, ssr.blocks()[0], ssr.get_buffer("gates")
    if not gates[1].any():  # every batch was left out
        return
    signal = signals(gates[:2])
    # Sums may differ in the last bit between machines of different kinds.
    ranks.take_first(signal)
    closed = gates[2].bool() | (signal < -config.adapt_threshold)
    gates[2] = closed
    weight, indices = first.fusion.dense.weight, first.filter.get_buffer("indices")
    dims = torch.tensor(ssr.field_dims, device=signal.device)
    generator = torch.Generator().manual_seed(config.index_seed * 1_000_003 + step)
    now = moved(indices, signal.repeat_interleave(dims), closed.repeat_interleave(dims), generator)
    forget(weight, states(weight), now != indices)
    indices.copy_(now)
