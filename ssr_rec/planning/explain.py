"""Says why a table went where it went, and what is too much where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrec.distributed.planner.types import ShardingOption

from ssr_rec.planning.cases import Case
from ssr_rec.planning.estimate import Estimate
from ssr_rec.planning.row_blocks import busy_shares
from ssr_rec.planning.search import Found, option_bytes

GIB = 2**30
UNEVEN = 1.5
"""Times the mean block's lookups from which a block of rows is called uneven."""


@dataclass(frozen=True)
class TablePlan:
    """Describes one table of a plan.

    Attributes:
        ranks: one per shard, in the order of the shards.
        device_bytes, host_bytes: weights and optimizer state of all shards.
        ms: estimated lookup and all-to-all of all shards together; ``slowest_ms`` that of the slowest.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    sharding_type: str
    kernel: str
    ranks: list[int]
    device_bytes: int
    host_bytes: int
    ms: float
    slowest_ms: float
    why: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def table_plans(case: Case, found: Found) -> list[TablePlan]:
    """Return every table, the largest first."""
    lines = []
    for option in found.options:
        sizes = [option_bytes(case, option, shard.size) for shard in option.shards]
        lines.append(
            TablePlan(
                name=option.name,
                rows=option.tensor.shape[0],
                columns=option.tensor.shape[1],
                dtype={2: "fp16", 4: "fp32"}[option.tensor.element_size()],
                sharding_type=option.sharding_type,
                kernel=option.compute_kernel,
                ranks=[shard.rank for shard in option.shards if shard.rank is not None],
                device_bytes=sum(size.weights + size.state for size in sizes),
                host_bytes=sum(size.host for size in sizes),
                ms=option.total_perf,
                slowest_ms=_slowest(option),
                why=why(option, found.alternatives[option.name], found.table_bytes) + _uneven(case, option),
            )
        )
    return sorted(lines, key=lambda line: -(line.device_bytes + line.host_bytes))


def why(chosen: ShardingOption, alternatives: Sequence[ShardingOption], table_bytes: int) -> str:
    """Return the reason for a choice, by the estimates of what was rejected."""
    others = [option for option in alternatives if _way(option) != _way(chosen)]
    if not others:
        return "the only way open to it"
    too_large = [option for option in others if _largest(option) > table_bytes]
    parts = [f"{_way(option)} needs {_largest(option) / GIB:.1f} GiB on one rank" for option in too_large]
    rest = sorted((option for option in others if option not in too_large), key=lambda option: option.total_perf)
    if rest:
        best = rest[0]
        against = f"{chosen.total_perf:.3g} ms in all against {best.total_perf:.3g} by {_way(best)}"
        if chosen.total_perf <= best.total_perf:
            parts.append(f"least work: {against}")
        elif _slowest(chosen) < _slowest(best):
            slowest = f"{_slowest(chosen):.3g} ms on its slowest rank against {_slowest(best):.3g} by {_way(best)}"
            parts.append(f"spreads the work: {slowest}")
        else:
            parts.append(f"makes room or balance for others, at {against}")
    return "; ".join(parts)


def _uneven(case: Case, option: ShardingOption) -> str:
    """Return what to say of a table whose blocks of rows get lookups very unevenly."""
    shares = busy_shares(case, option)
    if max(shares) < UNEVEN:
        return ""
    return (
        f"; the busiest of its {len(shares)} blocks of rows gets {max(shares) / len(shares):.0%} of the lookups: "
        "spread_ids: true in the spec numbers frequent values over all blocks"
    )


def _way(option: ShardingOption) -> str:
    return option.sharding_type + ("" if option.compute_kernel in ("fused", "dense") else f"/{option.compute_kernel}")


def _largest(option: ShardingOption) -> int:
    return max(max(shard.storage.hbm, 0 if shard.storage.hbm else shard.storage.ddr) for shard in option.shards)


def _slowest(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards)


@dataclass(frozen=True)
class Overflow:
    """Names a rank that has too little memory in the least uneven plan, and what is on it.

    Attributes:
        where: device or host.
        tables: name -> bytes on this rank, the largest first.
    """

    rank: int
    where: str
    missing_bytes: int
    tables: list[tuple[str, int]]

    def __str__(self) -> str:
        largest = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in self.tables[:3])
        more = len(self.tables) - 3
        rest = f" and {more} more" if more > 0 else ""
        memory = "memory" if self.where == "device" else "host memory"
        return (
            f"rank {self.rank} is {self.missing_bytes / GIB:.1f} GiB over its {memory}: {largest or 'no table'}{rest}"
        )


def overflows(case: Case, found: Found, estimate: Estimate) -> list[Overflow]:
    """Return every rank with too little memory, the worst first."""
    world = case.world
    host_bytes = world.hardware.host_bytes(world.per_node) if world.hardware.device == "cuda" else None
    over = []
    for rank, memory in enumerate(estimate.memory):
        missing = {"device": -memory.headroom, "host": memory.host - host_bytes if host_bytes is not None else 0}
        limit = case.config.sharding.memory_gib
        if limit is not None:
            tables = memory.weights + memory.optimizer
            missing["device"] = max(missing["device"], tables - int(limit * GIB))
        for where, bytes_over in missing.items():
            if bytes_over > 0:
                over.append(Overflow(rank, where, bytes_over, _tables_on(case, found, rank, where)))
    return sorted(over, key=lambda overflow: -overflow.missing_bytes)


def _tables_on(case: Case, found: Found, rank: int, where: str) -> list[tuple[str, int]]:
    sizes = []
    for option in found.options:
        for shard in option.shards:
            if shard.rank == rank:
                size = option_bytes(case, option, shard.size)
                sizes.append((option.name, size.weights + size.state if where == "device" else size.host))
    return sorted(sizes, key=lambda pair: -pair[1])
