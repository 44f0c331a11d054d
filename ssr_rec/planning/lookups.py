"""Counts what a rank looks up in a shard, and times it on a CPU, where TorchRec's stream of bytes is far too fast."""

from __future__ import annotations

from dataclasses import replace

from torchrec.distributed.planner.types import Perf, ShardingOption

from ssr_rec.planning.cases import Case
from ssr_rec.planning.costs import FLOAT_BYTES, ID_BYTES

FORWARD_SHARE = 1 / 3
"""Of a lookup with its backward pass and update."""
UPDATES = {"sgd": 0.6, "rowwise_adagrad": 1.0, "adagrad": 1.7, "lazy_adam": 1.4}
"""Optimizer -> times as long as row-wise Adagrad's its backward pass and update take (docs/performance.md)."""
WEIGHTED = 1.5
"""Times as long FBGEMM's CPU form takes with weights: 1.3 to 1.7 measured (docs/data.md)."""


def looked_up(case: Case, option: ShardingOption) -> tuple[float, int]:
    """Return the ids that a rank looks up in a shard for a global batch, and the pooled rows that it makes of them."""
    world, batch = case.world, case.rows_per_rank * case.world.size
    parts = {"row_wise": world.size, "table_row_wise": world.per_node, "data_parallel": world.size}
    bags = case.bags(option.name)
    ids = batch * bags * sum(option.input_lengths) / parts.get(option.sharding_type, 1)
    return ids, int(bags * (case.rows_per_rank if option.sharding_type == "data_parallel" else batch))


def lookup_times(case: Case, option: ShardingOption, columns: int, perf: Perf | None) -> Perf | None:
    """Return a shard's times with those that TorchRec does not know.

    The lookup's by bags, ids and bytes, where the hardware gives those; and the exchange of ids with their weights,
    which TorchRec counts in a lookup alone.
    """
    if perf is None:
        return None
    is_weighted = case.is_weighted(option.name)
    if is_weighted:
        perf = replace(perf, input_dist_comms=perf.input_dist_comms * (ID_BYTES + FLOAT_BYTES) / ID_BYTES)
    costs = case.world.hardware.assumptions.lookup_ns
    if costs is None:
        return perf
    ids, pooled_rows = looked_up(case, option)
    moved = (ids * option.tensor.element_size() + pooled_rows * FLOAT_BYTES) * columns
    nanoseconds = (pooled_rows * costs.bag + ids * costs.id + moved * costs.byte) * (WEIGHTED if is_weighted else 1)
    milliseconds = nanoseconds / 1e6 / case.world.hardware.share(case.world.per_node)
    back = (1 - FORWARD_SHARE) * UPDATES.get(case.config.embeddings.optimizer, 1.0)
    return replace(perf, fwd_compute=FORWARD_SHARE * milliseconds, bwd_compute=back * milliseconds)
