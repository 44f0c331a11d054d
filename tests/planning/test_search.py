"""Plans of small cases: what must hold whatever TorchRec's planner chooses, and what has one answer."""

from collections import Counter
from dataclasses import replace

import pytest
from torchrec.distributed.planner.proposers import UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import SharderData, ShardingOption

from ssr_rec.embeddings.sharding import build_sharders
from ssr_rec.planning.explain import overflows, table_plans
from ssr_rec.planning.remedies import Planned, plan_case, try_balancing, try_remedies
from ssr_rec.planning.search import MOST_PLACED, PATIENCE, CaseEstimator, Limited, make_topology
from tests.planning.small import make_case, with_memory

ROWS = {"user": 1_000_000, "item": 200_000, "seller": 50_000, "hour": 24, "query": 300_000}
TABLE_WISE = "--sharding.types=[table_wise]"


def ways(planned: Planned) -> dict[str, tuple[str, str]]:
    return {option.name: (option.sharding_type, option.compute_kernel) for option in planned.found.options}


def test_every_table_is_somewhere_once_and_bytes_add_up() -> None:
    planned = plan_case(make_case(ROWS, [], nodes=2, per_node=4))
    assert sorted(ways(planned)) == sorted(ROWS)
    assert planned.fits
    elements = Counter[str]()
    for option in planned.found.options:
        for shard in option.shards:
            assert shard.rank is not None and 0 <= shard.rank < 8
            elements[option.name] += shard.size[0] * shard.size[1]
    assert elements == {name: rows * 16 for name, rows in ROWS.items()}
    assert sum(memory.weights for memory in planned.estimate.memory) == sum(ROWS.values()) * 16 * 4
    assert sum(memory.optimizer for memory in planned.estimate.memory) == sum(ROWS.values()) * 4


def test_a_table_larger_than_a_rank_is_cut_by_rows() -> None:
    """user is 65 MiB with its state, a rank has 60: table-wise cannot be, and the reason says so."""
    planned = plan_case(with_memory(make_case(ROWS, []), 60 / 1024))
    assert planned.fits
    assert ways(planned)["user"][0] == "row_wise"
    user = next(table for table in table_plans(planned.case, planned.found) if table.name == "user")
    assert user.ranks == [0, 1]
    assert "table_wise needs 0.1 GiB on one rank" in user.why


def test_the_fallback_fits_what_balancing_time_cannot() -> None:
    """Tables of equal time and very unequal size, whole only, on ranks that hold them in one way alone."""
    rows = {"a": 900_000, "b": 500_000, "c": 400_000, "d": 300_000, "e": 200_000, "f": 100_000}
    case = make_case(rows, [TABLE_WISE, "--train.batch_size=64"])
    planned = plan_case(with_memory(case, 1_215_000 * 68 / 2**30))
    assert planned.fits
    assert max(memory.used for memory in planned.estimate.memory) <= 1_215_000 * 68


def test_what_does_not_fit_names_table_rank_and_missing_bytes() -> None:
    case = with_memory(make_case(ROWS, [TABLE_WISE]), 60 / 1024)
    planned = plan_case(case)
    assert not planned.fits
    over = overflows(case, planned.found, planned.estimate)
    assert len(over) == 1 and over[0].tables[0] == ("user", 1_000_000 * 68)
    memory = planned.estimate.memory[over[0].rank]
    assert over[0].missing_bytes == memory.used - 60 * 2**20
    assert over[0].missing_bytes >= 1_000_000 * 68 - 60 * 2**20
    assert f"rank {over[0].rank} is 0.0 GiB over its memory: user 0.1 GiB" in str(over[0])


def test_remedies_are_planned_and_only_those_that_help_fit() -> None:
    case = with_memory(make_case(ROWS, [TABLE_WISE, "--embeddings.optimizer=sgd"]), 60 / 1024)
    remedies = {remedy.name: remedy.planned for remedy in try_remedies(plan_case(case))}
    assert set(remedies) == {"more nodes", "row-wise", "UVM caching", "fp16 tables", "smaller dim"}
    fits = {name: planned is not None and planned.fits for name, planned in remedies.items()}
    # user is 61 MiB: whole it fits on no rank, however many; halved it does.
    assert fits == {
        "more nodes": False,
        "row-wise": True,
        "UVM caching": True,
        "fp16 tables": True,
        "smaller dim": True,
    }
    assert remedies["fp16 tables"].case.config.embeddings.dtype == "fp16"  # type: ignore[union-attr]
    assert remedies["smaller dim"].case.config.embeddings.dim == 8  # type: ignore[union-attr]
    assert ways(remedies["UVM caching"])["user"][1] == "fused_uvm_caching"  # type: ignore[arg-type]


def test_more_nodes_are_a_remedy_where_tables_can_spread() -> None:
    case = with_memory(make_case(ROWS, [], per_node=1), 30 / 1024)
    remedy = next(try_remedies(plan_case(case)))
    assert remedy.name == "more nodes" and remedy.planned is not None and remedy.planned.fits
    assert remedy.settings == "--nodes 4"  # 106 MiB in all


def test_together_is_tried_where_no_single_remedy_is_enough() -> None:
    case = with_memory(make_case({"user": 1_000_000}, [TABLE_WISE, "--embeddings.optimizer=sgd"], per_node=1), 5 / 1024)
    remedies = {remedy.name: remedy for remedy in try_remedies(plan_case(case))}
    singles = [remedies[name] for name in ("row-wise", "UVM caching", "fp16 tables", "smaller dim")]
    assert not any(remedy.planned.fits for remedy in singles if remedy.planned)
    together, last = remedies["all of these"], remedies["and more nodes"]
    assert "--embeddings.dtype=fp16" in together.settings and "--embeddings.dim=8" in together.settings
    assert last.planned is not None and last.planned.fits
    assert last.planned.case.config == together.planned.case.config  # type: ignore[union-attr]
    assert last.planned.case.world.nodes == int(last.settings.split("--nodes ")[1]) > 1
    changed = together.planned.case.config  # type: ignore[union-attr]
    assert (changed.embeddings.dtype, changed.embeddings.dim) == ("fp16", 8)


def test_fp16_halves_weights_and_not_the_state() -> None:
    full, half = (plan_case(make_case(ROWS, [f"--embeddings.dtype={d}"])).estimate for d in ("fp32", "fp16"))
    assert 2 * sum(m.weights for m in half.memory) == sum(m.weights for m in full.memory)
    assert sum(m.optimizer for m in half.memory) == sum(m.optimizer for m in full.memory)
    # Pooled rows are fp32 either way, so the all-to-all is as long.
    assert half.step.all_to_all == pytest.approx(full.step.all_to_all)


def test_qcomms_halve_the_exchange() -> None:
    half_precision = ["--sharding.qcomms={forward: fp16, backward: bf16}", TABLE_WISE]
    full, half = (plan_case(make_case(ROWS, o, nodes=2)).estimate for o in ([TABLE_WISE], half_precision))
    exchanges = [sum(time.exchange for time in estimate.time) for estimate in (full, half)]
    assert exchanges[1] == pytest.approx(exchanges[0] / 2)


def test_uvm_moves_tables_to_the_host() -> None:
    cached = ["--sharding.kernels=[fused_uvm_caching]", "--sharding.cache_load_factor=0.1", TABLE_WISE]
    memory = plan_case(make_case(ROWS, cached)).estimate.memory
    assert sum(m.host for m in memory) == sum(ROWS.values()) * (16 * 4 + 4)
    assert sum(m.weights for m in memory) == pytest.approx(sum(ROWS.values()) * (6.4 + 4 + 1.6), rel=1e-4)
    assert sum(m.optimizer for m in memory) == 0


def test_too_little_host_memory_is_named() -> None:
    case = make_case(ROWS, ["--sharding.kernels=[fused_uvm]", TABLE_WISE])
    hardware = case.world.hardware.model_copy(update={"host_memory_gib": 0.2})  # of which tables may have half
    planned = plan_case(replace(case, world=replace(case.world, hardware=hardware)))
    assert not planned.fits
    worst = overflows(planned.case, planned.found, planned.estimate)[0]
    assert worst.where == "host" and worst.tables[0][0] == "user"
    assert worst.missing_bytes == planned.estimate.memory[worst.rank].host - int(0.05 * 2**30)
    assert "over its host memory: user 0.1 GiB" in str(worst)


def test_faster_memory_and_links_shorten_their_parts() -> None:
    case = make_case(ROWS, [TABLE_WISE], nodes=2)
    hardware = case.world.hardware
    memory = hardware.model_copy(update={"memory_gb_s": 2 * hardware.memory_gb_s})
    network = hardware.model_copy(update={"network_gbit_s": 2 * hardware.network_gbit_s})
    plain, fast, wide = (
        plan_case(replace(case, world=replace(case.world, hardware=h))).estimate for h in (hardware, memory, network)
    )
    lookups = [sum(time.lookup for time in estimate.time) for estimate in (plain, fast, wide)]
    exchanges = [sum(time.exchange for time in estimate.time) for estimate in (plain, fast, wide)]
    assert lookups[1] == pytest.approx(lookups[0] / 2) and lookups[2] == pytest.approx(lookups[0])
    assert exchanges[2] == pytest.approx(exchanges[0] / 2) and exchanges[1] == pytest.approx(exchanges[0])


def test_memory_gib_limits_the_tables() -> None:
    assert not plan_case(make_case(ROWS, [TABLE_WISE, "--sharding.memory_gib=0.03"])).fits
    assert plan_case(make_case(ROWS, ["--sharding.memory_gib=0.07"])).fits


def test_long_lists_take_longer() -> None:
    """Ids of a list are looked up one by one, its pooled row travels once."""
    short, long = (
        plan_case(make_case({"seen": 50_000}, [TABLE_WISE], lengths={"seen": length})).estimate
        for length in (2.0, 40.0)
    )
    assert long.step.lookup > 5 * short.step.lookup
    assert long.step.all_to_all == pytest.approx(short.step.all_to_all)
    assert max(t.ids for t in long.time) == pytest.approx(20 * max(t.ids for t in short.time))


def test_one_estimate_for_equal_shards_is_torchrecs_for_each() -> None:
    """Row-wise shards of 1,000,003 rows on 8 ranks: seven equal, one shorter."""
    case = make_case({"user": 1_000_003, "item": 77}, [], nodes=2, per_node=4)
    planned = plan_case(case)
    topology = make_topology(case, planned.found.table_bytes)
    [sharder, _] = build_sharders(case.config.sharding, "cuda")
    options = [option for options in planned.found.alternatives.values() for option in options]
    assert {option.sharding_type for option in options} == {"table_wise", "row_wise", "table_row_wise"}
    data = SharderData({}, {}, sharder.storage_usage_type if hasattr(sharder, "storage_usage_type") else None)  # type: ignore[arg-type]
    data_map = {option.module_type_key: data for option in options}
    CaseEstimator(topology, None, case).estimate(options, data_map)
    ours = [shard.perf for option in options for shard in option.shards]
    EmbeddingPerfEstimator(topology=topology).estimate(options, data_map)
    assert ours == [shard.perf for option in options for shard in option.shards]
    assert len({shard.size[0] for shard in options[0].shards}) <= 2


def test_the_reason_is_the_estimates() -> None:
    planned = plan_case(make_case(ROWS, [], nodes=2, per_node=4))
    for table in table_plans(planned.case, planned.found):
        options = {option.sharding_type: option for option in planned.found.alternatives[table.name]}
        rejected = [option for kind, option in options.items() if kind != table.sharding_type]
        if "least work" in table.why:
            assert table.ms <= min(option.total_perf for option in rejected)
        assert table.ms == pytest.approx(options[table.sharding_type].total_perf)
    only = plan_case(make_case(ROWS, [TABLE_WISE]))
    assert {table.why for table in table_plans(only.case, only.found)} == {"the only way open to it"}


def test_balancing_cuts_columns_finer() -> None:
    """One table with long lists on four ranks: whole it lies on one, halved on two, quartered on all."""
    kinds = ["--sharding.types=[table_wise,column_wise]", "--train.batch_size=65536", "--embeddings.dim=128"]
    case = make_case({"seen": 900_000, "item": 100}, kinds, per_node=4, lengths={"seen": 500.0})
    columns = []
    for remedy in try_balancing(plan_case(case)):
        assert remedy.planned is not None
        seen = next(option for option in remedy.planned.found.options if option.name == "seen")
        columns.append([shard.size[1] for shard in seen.shards])
        assert len({shard.rank for shard in seen.shards}) == len(seen.shards)
    assert columns == [[64, 64], [32, 32, 32, 32]]


def test_a_limited_search_ends_after_as_many_proposals_as_place_its_share_of_tables() -> None:
    for tables, proposals in ((300, MOST_PLACED // 300), (1_000_000, PATIENCE)):
        limited, made = Limited(Endless(), tables), 0
        while limited.propose() is not None:
            limited.feedback(partitionable=True, perf_rating=1.0)
            made += 1
        assert made == proposals


class Endless(UniformProposer):
    """Always has another proposal."""

    def propose(self) -> list[ShardingOption] | None:
        return []
