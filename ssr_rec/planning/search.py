"""Runs TorchRec's ``EmbeddingShardingPlanner`` over a case, with our bytes and links, and notes what it chose among."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    Enumerator,
    HardwareConfig,
    KernelConfig,
    Perf,
    PlannerError,
    Proposer,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Storage,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CommOp

from ssr_rec.embeddings.sharding import build_constraints, build_sharders, spread_tables
from ssr_rec.embeddings.tables import build_tables
from ssr_rec.planning.cases import Case
from ssr_rec.planning.costs import (
    BATCHES_IN_FLIGHT,
    DENSE_BYTES,
    FLOAT_BYTES,
    ID_BYTES,
    DenseCost,
    Links,
    Model,
    ShardBytes,
    extra_tables,
    shard_bytes,
)
from ssr_rec.planning.lookups import looked_up, lookup_times
from ssr_rec.planning.row_blocks import block_times, busy_shares

TORCHREC_LOAD_FACTOR = 0.2
"""Of a cached table without a cache_load_factor: UVM_CACHING_RATIO in torchrec/distributed/planner/constants.py."""
TORCHREC_MIN_COLUMNS = 128
"""Of a column-wise shard without a min_partition: MIN_CW_DIM there."""
UNLIMITED = 2**60
PATIENCE = 20
"""Proposals without a better plan before a greedy search ends."""
MOST_PLACED = 15_000
"""Tables that one greedy search places, over all its proposals: about five seconds, whatever the number of tables."""
MANY_SHARDS = 20_000
SMALL_TABLE = 0.001
"""Share of a rank's memory below which a table is not cut by rows, where there would be ``MANY_SHARDS`` otherwise."""


@dataclass(frozen=True)
class Found:
    """Holds a plan for the case; where none is found that fits, the one of most even memory, which may fit after all.

    Attributes:
        options: a table's chosen way of sharding, with ranks and estimates; one per table.
        alternatives: table -> every way that was open to it, with estimates, without ranks.
        table_bytes: memory of one rank that was left for tables and their buffers.
        seconds: that the search took.
    """

    options: list[ShardingOption]
    alternatives: dict[str, list[ShardingOption]]
    table_bytes: int
    seconds: float


class CaseEstimator(ShardEstimator):
    """Takes TorchRec's time of a shard, once for every distinct size, and our bytes in place of TorchRec's.

    TorchRec's storage is weights, state, ids and pooled rows in one sum, its row-wise state forgets that every
    column-wise shard has its own, and its bytes in flight are of another pipeline: docs/planner.md.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        case: Case | None = None,
        by_memory: bool = False,
    ) -> None:
        assert case is not None
        self.topology, self.case, self.by_memory = topology, case, by_memory
        self.perf = EmbeddingPerfEstimator(topology=topology, constraints=constraints)

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        distinct = []
        for option in sharding_options:
            one_each = copy(option)
            one_each.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
            distinct.append(one_each)
        self.perf.estimate(distinct, _in_float32(sharder_data_map))
        on_gpu = self.topology.compute_device == "cuda"
        for option, one_each in zip(sharding_options, distinct, strict=True):
            option.is_weighted = one_each.is_weighted
            perfs = {tuple(shard.size): shard.perf for shard in one_each.shards}
            shares = busy_shares(self.case, option)
            for place, shard in enumerate(option.shards):
                size = option_bytes(self.case, option, shard.size)
                device = size.weights + size.state + size.gradients + size.buffers
                shard.storage = Storage(hbm=device if on_gpu else 0, ddr=size.host if on_gpu else device)
                perf = lookup_times(self.case, option, shard.size[1], perfs[tuple(shard.size)])
                shard.perf = block_times(self.case, option, perf, shares[place % len(shares)])
                if self.by_memory:
                    shard.perf = Perf(fwd_compute=device / 2**20, fwd_comms=0, bwd_compute=0, bwd_comms=0)


def _in_float32(sharders: SharderDataMap) -> SharderDataMap:
    """Pooled rows travel as fp32 where no qcomms say otherwise; TorchRec would take the type of the table."""
    kinds = (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name)
    plain = dict.fromkeys(kinds, (float(FLOAT_BYTES), float(FLOAT_BYTES)))
    return {key: replace(data, qcomm_dtype_sizes={**plain, **data.qcomm_dtype_sizes}) for key, data in sharders.items()}


def option_bytes(case: Case, option: ShardingOption, size: Sequence[int]) -> ShardBytes:
    """Return bytes of one shard of that size under that way of sharding."""
    ids, pooled_rows = looked_up(case, option)
    # The ids of weighted lists are sent with their weights, within the step that looks them up.
    in_flight = ID_BYTES + FLOAT_BYTES if case.is_weighted(option.name) else BATCHES_IN_FLIGHT * ID_BYTES
    return shard_bytes(
        size,
        option.tensor.element_size(),
        case.config.embeddings.optimizer,
        option.compute_kernel,
        option.cache_load_factor or TORCHREC_LOAD_FACTOR,
        id_bytes=ids * in_flight,
        pooled_rows=pooled_rows,
    )


@dataclass(frozen=True)
class FixedBytes:
    """Counts the memory of a rank that does not depend on the plan.

    Attributes:
        dense: weights, gradients and Adam state of the over-arch and heads, and their buffers.
        activations: kept for the backward pass.
        buffers: the rank's own batches, and the pooled rows it gets with their gradients.
    """

    dense: int
    activations: int
    buffers: int


def fixed_bytes(case: Case, dense: DenseCost, columns: float) -> FixedBytes:
    """Count what a rank keeps besides its tables.

    Args:
        columns: of all tables together, the width of what a row looks up, all its events included.
    """
    rows, config = case.rows_per_rank, case.config
    copies = sum(DENSE_BYTES.values()) + (2 if config.train.bf16 else 0)  # autocast keeps bf16 copies of the weights
    ids = sum(case.lengths.get(name, 1.0) for name in case.schema.feature_names)
    weights = sum(case.lengths.get(feature.name, 1.0) for feature in case.schema.weighted_lists)
    batch = ids * ID_BYTES + FLOAT_BYTES * (weights + len(case.schema.labels))
    row = BATCHES_IN_FLIGHT * batch + 2 * columns * FLOAT_BYTES
    return FixedBytes(
        dense=dense.parameters * copies + dense.buffer_bytes,
        activations=int(dense.activation_bytes * rows + dense.fixed_bytes),
        buffers=int(rows * row),
    )


def make_topology(case: Case, table_bytes: int) -> Topology:
    """Return the case's ranks for TorchRec; ``table_bytes`` is what one of them has for tables."""
    world, hardware = case.world, case.world.hardware
    share, on_gpu = hardware.share(world.per_node), hardware.device == "cuda"
    host = hardware.host_bytes(world.per_node) if table_bytes < UNLIMITED else UNLIMITED
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world.size, local_world_size=world.per_node),
        HardwareConfig(
            hbm_cap_bytes=table_bytes if on_gpu else None,
            ddr_cap_bytes=host if on_gpu else table_bytes,
            hbm_mem_bw=hardware.memory_gb_s * 1e6,
            ddr_mem_bw=hardware.host_memory_gb_s * 1e6 * (share if not on_gpu else 1 / world.per_node),
            hbm_to_ddr_mem_bw=hardware.host_link_gb_s * 1e6,
        ),
        KernelConfig(
            compute_device=hardware.device,
            # Without it TorchRec takes a V100's bandwidths whatever HardwareConfig says.
            use_hardware_based_bandwidth=True,
            generalized_comms_bandwidths=Links(hardware, world.per_node),
        ),
    )


def find_plan(case: Case, dense: DenseCost) -> Found:
    """Return TorchRec's plan for the case: the fastest by its estimates, else the one with the most even memory.

    Raises:
        UserError: a setting of the config without effect or not for this device.
    """
    started = time.perf_counter()
    device = case.world.hardware.device
    tables = build_tables(case.schema, case.config.embeddings, device, extra_tables(case), case.reading)
    configs, events = tables.configs, case.reading.events
    fixed = fixed_bytes(case, dense, sum(table.embedding_dim * case.bags(table.name) for table in configs))
    left = case.world.hardware.rank_bytes(case.world.per_node) - fixed.dense - fixed.activations - fixed.buffers
    if case.config.sharding.memory_gib is not None:
        left = min(left, int(case.config.sharding.memory_gib * 2**30))
    left = max(left, 1)
    fused = case.config.embeddings.is_fused
    prefetch = case.config.train.pipeline == "prefetch"
    names = [table.name for table in configs]
    spread = spread_tables(tables.events, case.world.size)
    allowed = build_constraints(names, case.config.sharding, device, fused, prefetch, spread)
    sizes = {t.name: (t.num_embeddings, t.embedding_dim) for t in configs}
    keys = {t.name: t.feature_names for t in configs}
    constraints = {
        name: replace(
            constraint,
            sharding_types=_distinct_types(case, constraint, *sizes[name], left),
            pooling_factors=[1.0 if name in events else case.lengths.get(key, 1.0) for key in keys[name]],
            batch_sizes=[math.ceil(case.rows_per_rank * case.bags(name))] if name in events else None,
        )
        for name, constraint in allowed.items()
    }
    for by_memory, limit in ((False, left), (True, UNLIMITED)):
        topology = make_topology(case, limit)
        enumerator = EmbeddingEnumerator(
            topology=topology,
            batch_size=case.rows_per_rank,
            constraints=constraints,
            estimator=CaseEstimator(topology, constraints, case, by_memory),
        )
        options = _search(case, Model(tables), topology, constraints, enumerator)
        if options is not None:
            break
    assert options is not None, "unlimited memory, and no plan"
    space = enumerator.last_stored_search_space or []
    if by_memory:
        timed = CaseEstimator(topology, constraints, case)
        for some in (options, space):
            timed.estimate(some, enumerator._sharder_data_map)
    alternatives: dict[str, list[ShardingOption]] = {name: [] for name in sizes}
    for option in space:
        alternatives[option.name].append(option)
    return Found(options, alternatives, left, time.perf_counter() - started)


class Limited(Proposer):
    """Ends a proposer after so many proposals: not after so many seconds, or plans would depend on the machine."""

    def __init__(self, inner: Proposer, tables: int) -> None:
        self.inner, self.left = inner, max(PATIENCE, MOST_PLACED // tables)

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        self.inner.load(search_space, enumerator)

    def propose(self) -> list[ShardingOption] | None:
        return self.inner.propose() if self.left > 0 else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self.left -= 1
        self.inner.feedback(partitionable, plan, perf_rating, storage_constraint)


def _search(
    case: Case,
    model: Model,
    topology: Topology,
    constraints: Mapping[str, ParameterConstraints],
    enumerator: EmbeddingEnumerator,
) -> list[ShardingOption] | None:
    """Return the best plan's options, or None when no proposal can be placed."""
    best: list[ShardingOption] = []

    def keep(plan: list[ShardingOption]) -> list[ShardingOption]:
        best.extend(plan)
        return plan

    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=case.rows_per_rank,
        enumerator=enumerator,
        # What else needs memory has been taken off already, by formulas that the report can show.
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=[
            UniformProposer(),
            Limited(GreedyProposer(threshold=PATIENCE), len(constraints)),
            Limited(GreedyProposer(use_depth=False, threshold=PATIENCE), len(constraints)),
            GridSearchProposer(max_proposals=200),
        ],
        constraints=dict(constraints),
        stats=[],
        callbacks=[keep],
    )
    try:
        planner.plan(model, build_sharders(case.config.sharding, topology.compute_device))
    except PlannerError:
        return None
    return best


def _distinct_types(case: Case, constraint: ParameterConstraints, rows: int, columns: int, left: int) -> list[str]:
    """Return the allowed sharding types without those that would cut this table as another one does.

    With very many shards to look at, tables too small to matter are not cut by rows: on 1,024 ranks every table would
    otherwise bring 1,024 shards of next to nothing.
    """
    types = list(constraint.sharding_types or [])
    redundant = set()
    if (constraint.min_partition or TORCHREC_MIN_COLUMNS) >= columns and "table_wise" in types:
        redundant.add("column_wise")
    if case.world.nodes == 1 and "row_wise" in types:
        redundant.add("table_row_wise")
    if case.world.per_node == 1 and "table_wise" in types:
        redundant.add("table_row_wise")
    small = rows * columns * FLOAT_BYTES < SMALL_TABLE * left
    if small and len(case.schema.features) * case.world.size > MANY_SHARDS and "table_wise" in types:
        redundant |= {"row_wise", "table_row_wise"}
    return [kind for kind in types if kind not in redundant]
