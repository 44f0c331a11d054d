"""Captures what a trained model is fed and makes of it, on the first rows of an evaluation, for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssr_rec.model.ctr_model import DenseArch
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.jagged import Jagged, age_bucket, age_of_bucket

INPUT_ROWS = 1024
"""Rows of the input vector that an over-arch's statistics are of."""
EVENT_ROWS = 8192
"""Rows of each rank whose histories are looked at."""
AGE_BUCKETS = 64
"""Half octaves of an age and 1: enough for a century in seconds."""


class EventShares:
    """Measures how much the events of a sequence count for their targets, by how recent and how old they are.

    An event's share is its absolute weight over the mean one of its row's events, the mean over heads: 1 is as much as
    the average event, whatever the row's length. An encoder without weights has no shares.

    Attributes:
        rows: rows seen here.
    """

    def __init__(self, encoder: SequenceEncoder) -> None:
        self.encoder, self.rows = encoder, 0
        self.by_position = torch.zeros(3, encoder.max_length)
        self.by_age = torch.zeros(3, AGE_BUCKETS)

    @torch.no_grad()
    def add(self, events: Tensor, lengths: Tensor, target: Tensor | None, ages: Tensor | None) -> None:
        """Count the rows of a batch: what the encoder was called with."""
        if self.rows >= EVENT_ROWS:
            return
        self.rows += lengths.shape[0]
        jagged = Jagged.of(lengths, events.shape[0])
        weights = self.encoder.weights(events, lengths, target, ages).abs().mean(dim=1, keepdim=True)
        mean = jagged.take(jagged.sum(weights) / jagged.lengths.clamp_min(1).unsqueeze(1))
        shares = torch.where(mean > 0, weights / mean, 1.0).squeeze(1).float().cpu()
        moments = torch.stack([shares, torch.ones_like(shares), (shares - 1).square()])
        self.by_position.index_add_(1, jagged.back().cpu() - 1, moments)
        if ages is not None:
            self.by_age.index_add_(1, age_bucket(ages, AGE_BUCKETS).cpu().long(), moments)

    def compute(self) -> dict[str, Any]:
        """Return mean shares and numbers of events over all ranks; positions from the most recent. Collective.

        ``spread`` is the standard deviation of all shares from 1: 0 where no event counts more than another of its row.

        Ages are those from which a bucket begins, in the unit of the log; buckets without events are left out.
        """
        device = next((p.device for p in self.encoder.parameters()), torch.device("cpu"))
        sums = torch.cat([self.by_position, self.by_age], 1).double().to(device)
        dist.all_reduce(sums)
        position, age = (part.tolist() for part in sums.cpu().split([self.encoder.max_length, AGE_BUCKETS], dim=1))
        total, count, squares = position
        found: dict[str, Any] = {
            "shares": [t / n if n else None for t, n in zip(total, count, strict=True)],
            "events": [int(n) for n in count],
            "spread": math.sqrt(sum(squares) / sum(count)) if any(count) else None,
        }
        total, count, _ = age
        if aged := [bucket for bucket, n in enumerate(count) if n]:
            found["ages"] = [age_of_bucket(bucket) for bucket in aged]
            found["age_shares"] = [total[bucket] / count[bucket] for bucket in aged]
            found["age_events"] = [int(count[bucket]) for bucket in aged]
        return found


class Captured:
    """Keeps up to ``INPUT_ROWS`` rows of the over-arch's first input, and the shares of each sequence's events."""

    def __init__(self, dense: DenseArch) -> None:
        self.inputs: Tensor | None = None
        self.domain: Tensor | None = None
        self._has_domain = dense.over_arch.domain is not None
        pairs = dense.histories.pairs() if dense.histories is not None else []
        without = SequenceEncoder.weights  # an encoder that has not its own has none
        self.events = {h.name: EventShares(e) for h, e in pairs if type(e).weights is not without}

    def keep(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        if self.inputs is None:
            self.inputs = inputs[0][:INPUT_ROWS].detach().clone()
            self.domain = inputs[-1][:INPUT_ROWS].clone() if self._has_domain else None

    def found(self) -> dict[str, Any]:
        """Return ``inputs``, their ``domain`` and ``event_shares`` (of ``EventShares.compute``). Collective."""
        shares = {name: one.compute() for name, one in self.events.items()}
        return {"inputs": self.inputs, "domain": self.domain, "event_shares": shares}


@contextmanager
def capture(dense: DenseArch) -> Iterator[Captured]:
    """Look at what passes through ``dense`` inside the block."""
    captured = Captured(dense)
    handles = [dense.over_arch.register_forward_pre_hook(captured.keep)]
    for shares in captured.events.values():
        handles.append(shares.encoder.register_forward_pre_hook(lambda _, inputs, to=shares: to.add(*inputs)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
