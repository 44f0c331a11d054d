"""The shares of events: of plain loops, on any number of ranks, and in the report with its picture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssr_rec.sequences import DIN, DINConfig, Pool, PoolConfig, TargetAttention, TargetAttentionConfig
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.training.captured import EVENT_ROWS, EventShares
from tests.ranks import run_ranks

D, L = 8, 5
ENCODERS = {
    "din": lambda: DIN(D, D, D, L, DINConfig(hidden=[4])),
    "attention": lambda: TargetAttention(D, D, D, L, TargetAttentionConfig()),
    "last": lambda: Pool(D, 0, D, L, PoolConfig(mode="last")),
}


def batches(encoder: SequenceEncoder) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Three batches of 40 rows of 0 to L events; the ages fall within a row, from days to nothing."""
    drawn = torch.Generator().manual_seed(0)
    made = []
    for _ in range(3):
        lengths = torch.randint(0, L + 1, (40,), generator=drawn)
        n = int(lengths.sum())
        target = torch.randn(40, D, generator=drawn) if encoder.needs_target else None
        ages = torch.cat([torch.sort(torch.rand(int(k), generator=drawn), descending=True)[0] for k in lengths]) * 3e5
        made.append((torch.randn(n, D, generator=drawn), lengths, target, ages))
    return made


def shares_job(kind: str) -> dict[str, Any]:
    """What this rank's part of the batches gives together with those of the others."""
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    encoder = ENCODERS[kind]()
    shares = EventShares(encoder)
    for batch in batches(encoder)[dist.get_rank() :: dist.get_world_size()]:
        shares.add(*batch)
    return shares.compute()


def plain(kind: str) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Every event's share by position, and by the half octave of its age and 1."""
    torch.manual_seed(1)
    encoder = ENCODERS[kind]()
    by_position: dict[int, list[float]] = {}
    by_age: dict[int, list[float]] = {}
    for events, lengths, target, ages in batches(encoder):
        first = 0
        for row, k in enumerate(lengths.tolist()):
            mine = slice(first, first + k)
            first += k
            if not k:
                continue
            seen = None if target is None else target[row : row + 1]
            weights = encoder.weights(events[mine], torch.tensor([k]), seen, ages[mine]).abs().mean(1).tolist()
            for place, (weight, age) in enumerate(zip(weights, ages[mine].tolist(), strict=True)):
                share = weight / (sum(weights) / k)
                by_position.setdefault(k - place, []).append(share)
                octave = math.floor(math.log2(age + 1))
                by_age.setdefault(2 * octave + ((age + 1) / 2**octave >= 1.5), []).append(share)
    return by_position, by_age


@pytest.mark.parametrize("kind", ENCODERS)
def test_shares_are_those_of_a_plain_loop_on_one_rank_and_on_two(kind: str) -> None:
    by_position, by_age = plain(kind)
    for world_size in (1, 2):
        found = run_ranks(shares_job, world_size, kind)[0]
        assert found["events"] == [len(by_position[place]) for place in range(1, L + 1)]
        expected = [sum(by_position[place]) / len(by_position[place]) for place in range(1, L + 1)]
        assert found["shares"] == pytest.approx(expected, rel=1e-4)
        every = [share for shares in by_position.values() for share in shares]
        assert found["spread"] == pytest.approx(math.sqrt(sum((x - 1) ** 2 for x in every) / len(every)), rel=1e-4)
        assert found["age_events"] == [len(by_age[bucket]) for bucket in sorted(by_age)]
        assert found["age_shares"] == pytest.approx([sum(by_age[b]) / len(by_age[b]) for b in sorted(by_age)], rel=1e-4)
        assert found["ages"] == [(1.5 if bucket % 2 else 1) * 2 ** (bucket // 2) - 1 for bucket in sorted(by_age)]


def test_only_the_first_rows_are_looked_at() -> None:
    shares = EventShares(ENCODERS["last"]())
    batch = (torch.zeros(EVENT_ROWS, D), torch.ones(EVENT_ROWS, dtype=torch.long), None, None)
    for _ in range(3):
        shares.add(*batch)
    assert shares.rows == EVENT_ROWS and shares.by_position[1, 0] == EVENT_ROWS
