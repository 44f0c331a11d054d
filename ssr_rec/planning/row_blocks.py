"""Adapts TorchRec's times of row-wise shards: hot rows make blocks busy, and un-pooled tables on a CPU send less."""

from __future__ import annotations

from dataclasses import replace

from torchrec.distributed.planner.types import CollectiveType, Perf, ShardingOption

from ssr_rec.planning.cases import Case
from ssr_rec.planning.costs import Links


def busy_shares(case: Case, option: ShardingOption) -> list[float]:
    """Return how many times the mean block's lookups each block of rows gets, where rows are cut; else one 1."""
    blocks = {"row_wise": case.world.size, "table_row_wise": case.world.per_node}.get(option.sharding_type)
    if blocks is None:
        return [1.0]
    return (case.block_shares(option.name.split("@")[0], blocks) * blocks).tolist()


def block_times(case: Case, option: ShardingOption, perf: Perf | None, busy: float) -> Perf:
    """Return the times of a block with ``busy`` times the mean block's lookups.

    Pooled rows are as many for all blocks. Of a table read un-pooled, a CPU rank sends the vectors of its own block
    alone (``embeddings/row_wise.py``), where TorchRec counts one for every event of all ranks, in a reduce-scatter.
    """
    assert perf is not None
    sent = 1.0
    by_rows = option.sharding_type == "row_wise" and case.world.size > 1
    if by_rows and option.name in case.reading.events and case.world.hardware.device == "cpu":
        links, ranks = Links(case.world.hardware, case.world.per_node), (case.world.per_node, case.world.size)
        summed, exchanged = (
            links.get_bw(*ranks, kind) for kind in (CollectiveType.REDUCE_SCATTER, CollectiveType.ALL_TO_ALL)
        )
        sent = busy / case.world.size * summed / exchanged
    return replace(
        perf,
        fwd_compute=perf.fwd_compute * busy,
        fwd_comms=perf.fwd_comms * sent,
        bwd_compute=perf.bwd_compute * busy,
        bwd_comms=perf.bwd_comms * sent,
        prefetch_compute=perf.prefetch_compute * busy,
        input_dist_comms=perf.input_dist_comms * busy,
    )
