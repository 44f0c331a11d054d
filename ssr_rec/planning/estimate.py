"""Turns a plan into figures: memory of every rank, the parts of a step, and what follows for a whole training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torchrec.distributed.planner.types import CollectiveType, ShardingOption

from ssr_rec.planning.cases import Case
from ssr_rec.planning.costs import (
    ACTIVATION_PASSES,
    ADAM_TRAFFIC,
    FLOAT_BYTES,
    FORWARD_BACKWARD,
    DenseCost,
    Links,
    gemm_precision,
)
from ssr_rec.planning.search import FixedBytes, Found, fixed_bytes, option_bytes

UNBALANCED = 0.10
"""Share of the step that the mean rank may wait for the slowest before a plan is called unbalanced."""
COLLECTIVES = 4
"""Of a step beside the dense all-reduce: lengths and ids ahead of it, pooled rows forward, their gradients back."""


@dataclass(frozen=True)
class RankMemory:
    """Counts the bytes of one rank; ``capacity`` is the device's memory as CUDA or the system reports it."""

    weights: int
    optimizer: int
    dense: int
    activations: int
    buffers: int
    reserved: int
    capacity: int
    host: int

    @property
    def used(self) -> int:
        return self.weights + self.optimizer + self.dense + self.activations + self.buffers + self.reserved

    @property
    def headroom(self) -> int:
        """Return the bytes to spare, negative when the rank has too little."""
        return self.capacity - self.used


@dataclass(frozen=True)
class RankTime:
    """Gives milliseconds of one rank's tables in a step; ``ids`` are on their way while another batch is in work."""

    lookup: float
    exchange: float
    ids: float

    @property
    def total(self) -> float:
        return self.lookup + self.exchange


@dataclass(frozen=True)
class StepTime:
    """Gives the milliseconds of a step.

    Attributes:
        lookup, all_to_all: of the slowest rank: everybody waits for it.
        dense: products, elementwise work and Adam of the over-arch.
        all_reduce: of the dense gradients, in all; ``exposed_all_reduce`` is what the backward pass does not hide.
        host: Python and the launching of kernels, beside the device's work but for ``serial_share`` of the shorter.
        waiting: of the mean rank for the slowest, within lookup and all-to-all.
    """

    lookup: float
    all_to_all: float
    dense: float
    all_reduce: float
    exposed_all_reduce: float
    host: float
    waiting: float
    serial_share: float

    @property
    def device(self) -> float:
        return self.lookup + self.all_to_all + self.dense + self.exposed_all_reduce

    @property
    def total(self) -> float:
        return self._with_host(self.device)

    @property
    def exposed_waiting(self) -> float:
        """Return what even tables would take off the step: the host's work hides some of what ranks wait."""
        return self.total - self._with_host(self.device - self.waiting)

    def _with_host(self, device: float) -> float:
        return max(device, self.host) + self.serial_share * min(device, self.host)

    @property
    def bound(self) -> str:
        """Return what a step's time goes to, more than to anything else."""
        parts = {
            "lookup": self.lookup,
            "all-to-all": self.all_to_all,
            "dense compute": self.dense,
            "all-reduce": self.exposed_all_reduce,
        }
        return "host (small step)" if self.host > self.device else max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Estimate:
    """Says what a plan is estimated to need.

    Attributes:
        memory, time: per rank.
        batch_size: rows of a global batch.
        within: times that ``samples_per_s`` may be off, up or down.
    """

    memory: list[RankMemory]
    time: list[RankTime]
    step: StepTime
    batch_size: int
    within: float

    @property
    def samples_per_s(self) -> float:
        return self.batch_size / self.step.total * 1000

    @property
    def samples_range(self) -> tuple[float, float]:
        """Return the least and the most samples/s to expect."""
        return self.samples_per_s / self.within, self.samples_per_s * self.within

    @property
    def imbalance(self) -> float:
        """Return the time of the slowest rank's tables over the mean rank's."""
        times = [rank.total for rank in self.time]
        return max(times) * len(times) / sum(times)

    @property
    def waiting_share(self) -> float:
        """Return the share of the step that waiting for the slowest rank's tables adds."""
        return self.step.exposed_waiting / self.step.total

    @property
    def is_unbalanced(self) -> bool:
        return self.waiting_share > UNBALANCED

    @property
    def communication_samples_per_s(self) -> float:
        """Return the rate if nothing but communication took time, and none of it was hidden."""
        spent = self.step.all_to_all + self.step.all_reduce
        return self.batch_size / spent * 1000 if spent else float("inf")

    def days(self, rows: float) -> float:
        return rows / self.samples_per_s / 86_400

    def as_json(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "samples_per_s": self.samples_per_s,
            "samples_per_s_range": self.samples_range,
            "imbalance": self.imbalance,
            "waiting_share": self.waiting_share,
            "unbalanced": self.is_unbalanced,
            "bound": self.step.bound,
            "communication_samples_per_s": self.communication_samples_per_s,
            "step_ms": {**asdict(self.step), "device": self.step.device, "total": self.step.total},
            "ranks": [
                {
                    "rank": rank,
                    "memory_bytes": {**asdict(memory), "used": memory.used, "headroom": memory.headroom},
                    "time_ms": {**asdict(time), "total": time.total},
                }
                for rank, (memory, time) in enumerate(zip(self.memory, self.time, strict=True))
            ],
        }


def estimate_plan(case: Case, found: Found, dense: DenseCost) -> Estimate:
    columns = sum(options[0].tensor.shape[1] for options in found.alternatives.values())
    memory = rank_memory(case, found.options, fixed_bytes(case, dense, columns))
    time = rank_time(case, found.options)
    host = host_time(case, found.options, dense)
    step = step_time(case, dense, time, host)
    return Estimate(memory, time, step, case.config.train.batch_size, case.world.hardware.assumptions.within)


def host_time(case: Case, options: list[ShardingOption], dense: DenseCost) -> float:
    """Return the milliseconds that a rank's host is busy in a step, whatever the rows."""
    assumed = case.world.hardware.assumptions
    ways = len({(option.sharding_type, option.compute_kernel) for option in options})
    small = assumed.host_table_us * len(options) + assumed.host_operator_us * dense.operators
    busy = assumed.host_step_ms + assumed.host_way_ms * ways + small / 1000
    return max(assumed.step_floor_ms, busy / assumed.host_speed)


def rank_memory(case: Case, options: list[ShardingOption], fixed: FixedBytes) -> list[RankMemory]:
    world = case.world
    hardware = world.hardware
    capacity = int(hardware.memory_gib * hardware.share(world.per_node) * 2**30)
    assumed = hardware.assumptions
    reserved = int(assumed.reserved_gib * 2**30 + assumed.fragmentation * capacity)
    sums = [dict.fromkeys(("weights", "optimizer", "gradients", "buffers", "host"), 0) for _ in range(world.size)]
    for option in options:
        for shard in option.shards:
            assert shard.rank is not None
            size = option_bytes(case, option, shard.size)
            rank = sums[shard.rank]
            rank["weights"] += size.weights
            rank["optimizer"] += size.state
            rank["gradients"] += size.gradients
            rank["buffers"] += size.buffers
            rank["host"] += size.host
    return [
        RankMemory(
            weights=rank["weights"],
            optimizer=rank["optimizer"],
            dense=fixed.dense + rank["gradients"],
            activations=fixed.activations,
            buffers=fixed.buffers + rank["buffers"],
            reserved=reserved,
            capacity=capacity,
            host=rank["host"],
        )
        for rank in sums
    ]


def rank_time(case: Case, options: list[ShardingOption]) -> list[RankTime]:
    """Return sums of TorchRec's estimates over the shards of each rank."""
    sums = [RankTime(0.0, 0.0, 0.0) for _ in range(case.world.size)]
    for option in options:
        for shard in option.shards:
            assert shard.rank is not None and shard.perf is not None
            perf, rank = shard.perf, sums[shard.rank]
            # The pipeline does not send weighted ids ahead: nothing hides their exchange.
            in_step = perf.input_dist_comms if case.is_weighted(option.name) else 0.0
            sums[shard.rank] = RankTime(
                rank.lookup + perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute,
                rank.exchange + perf.fwd_comms + perf.bwd_comms + in_step,
                rank.ids + perf.input_dist_comms - in_step,
            )
    return sums


def step_time(case: Case, dense: DenseCost, ranks: list[RankTime], host: float) -> StepTime:
    world, config = case.world, case.config
    hardware = world.hardware
    assumed = hardware.assumptions
    latency = assumed.collective_latency_us / 1000 if world.size > 1 else 0.0
    share = hardware.share(world.per_node)
    memory_bytes_per_ms = hardware.memory_gb_s * 1e6 * share
    rows, updates = case.rows_per_rank, 1 / config.train.accumulate
    products = FORWARD_BACKWARD * dense.matmul_flops * rows
    products_ms = products / hardware.gemm_flops(gemm_precision(case), world.per_node) * 1000
    elementwise_ms = ACTIVATION_PASSES * dense.activation_bytes * rows / memory_bytes_per_ms
    adam_ms = ADAM_TRAFFIC * dense.parameters / memory_bytes_per_ms * updates
    all_reduce = 0.0
    if world.size > 1:
        bandwidth = Links(hardware, world.per_node).get_bw(world.per_node, world.size, CollectiveType.ALL_REDUCE)
        all_reduce = (dense.parameters * FLOAT_BYTES / bandwidth + latency) * updates
    backward = (products_ms + elementwise_ms) * 2 / 3
    exchange = max(rank.exchange for rank in ranks) + COLLECTIVES * latency if world.size > 1 else 0.0
    if hardware.device == "cpu" and world.size > 1:
        exchange += max(rank.ids for rank in ranks)  # no stream of its own runs them beside another batch
    totals = [rank.total for rank in ranks]
    return StepTime(
        lookup=max(rank.lookup for rank in ranks),
        all_to_all=exchange,
        dense=products_ms + elementwise_ms + adam_ms,
        all_reduce=all_reduce,
        exposed_all_reduce=max(0.0, all_reduce - assumed.allreduce_overlap * backward),
        host=host,
        waiting=max(totals) - sum(totals) / len(totals),
        serial_share=assumed.serial_share,
    )


def memory_fields() -> list[str]:
    """Return the parts that add up to ``RankMemory.used``."""
    return [field.name for field in fields(RankMemory) if field.name not in ("capacity", "host")]
