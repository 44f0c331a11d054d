"""Row-wise shards are contiguous blocks of ids: how many lookups the busiest gets, and how ids are spread over them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.fit import spread_places
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.planning.cases import RowLookups, table_lookups
from ssr_rec.planning.explain import table_plans
from ssr_rec.planning.remedies import plan_case
from ssr_rec.planning.row_blocks import busy_shares
from tests.cases import one_quick
from tests.planning.small import make_case
from tests.prepare_log import make_rows, spec_with, write_csv
from tools.plan_sharding import main


def busiest(counts: list[int], blocks: int) -> float:
    """The busiest block's share, one id after another."""
    size, sums = -(-len(counts) // blocks), [0] * blocks
    for row, count in enumerate(counts):
        sums[row // size] += count
    return max(sums) / sum(counts)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 40_000])
def test_spread_places_are_a_permutation_that_any_number_of_blocks_shares_evenly(count: int) -> None:
    places = spread_places(count)
    assert sorted(places.tolist()) == list(range(count))
    if count < 10_000:
        return
    zipf = (1e7 / np.arange(10, count + 10)).astype(int)  # the most frequent has 1 % or less
    spread = np.zeros(count, int)
    spread[places] = zipf
    for blocks in (2, 3, 8, 16):
        assert busiest(zipf.tolist(), blocks) > 1.8 / blocks
        assert busiest(spread.tolist(), blocks) < 1.25 / blocks


@pytest.mark.parametrize("spread", one_quick(True, False))
def test_lookups_of_a_prepared_table_are_those_of_its_shards(tmp_path: Path, spread: bool) -> None:
    spec = spec_with(spread_ids=spread, min_count=1)  # uid is hashed
    schema = prepare([str(write_csv(make_rows(2000), tmp_path / "log.csv"))], tmp_path / "data", spec)
    assert schema.preparation.get("spread_ids", False) == spread
    lookups = table_lookups(tmp_path / "data", schema)
    for name in ("user", "city", "tags"):
        parts = [pq.read_table(tmp_path / "data" / shard.path)[name] for shard in schema.splits["train"].shards]
        ids = [i for part in parts for row in part.to_pylist() for i in (row if isinstance(row, list) else [row])]
        assert lookups[name].first.tolist() == np.bincount(ids, minlength=lookups[name].rows).tolist(), name
    user = lookups["user"].first
    case = replace(make_case({"user": len(user)}, []), lookups=lookups)
    for blocks in (2, 5, 8):
        assert case.block_shares("user", blocks).max() == pytest.approx(busiest(user.tolist(), blocks))
    assert case.block_shares("uid", 4) == pytest.approx(np.full(4, 0.25))
    falling = (np.diff(user[2:]) <= 0).all()
    assert falling == (not spread)


@pytest.mark.parametrize("admitted", one_quick(True, False))
def test_missing_and_unknown_values_make_the_first_block_of_a_hash_hot(tmp_path: Path, admitted: bool) -> None:
    spec = spec_with(hash_buckets={"city": 48, "uid": 2**30}, hash_min_count=3 if admitted else 1)
    schema = prepare([str(write_csv(make_rows(2000), tmp_path / "log.csv"))], tmp_path / "data", spec)
    parts = [pq.read_table(tmp_path / "data" / shard.path)["city"] for shard in schema.splits["train"].shards]
    ids = [row for part in parts for row in part.to_pylist()]
    lookups, special = table_lookups(tmp_path / "data", schema)["city"], {0, 1} if admitted else {0}
    rows = 48 + len(special)
    shares = lookups.block_shares(rows)
    for row in special:
        assert shares[row] == pytest.approx(ids.count(row) / len(ids)) and shares[row] > 0.1
    assert shares[len(special) :] == pytest.approx((1 - shares[: len(special)].sum()) / 48)
    size = -(-rows // 5)
    even = (len(ids) - sum(ids.count(row) for row in special)) / 48
    first = sum(ids.count(row) for row in special) + even * (size - len(special))
    assert lookups.block_shares(5)[0] == pytest.approx(first / len(ids))
    assert lookups.block_shares(5).sum() == pytest.approx(1)


def test_tables_are_cut_by_rows_where_their_lookups_are_even() -> None:
    rows, names = 200_000, ("a", "b", "c")
    may = ", ".join(f"{name}: {{types: [row_wise, table_wise]}}" for name in names)
    options = [f"--sharding.per_table={{{may}}}", "--train.batch_size=65536"]
    even = make_case(dict.fromkeys(names, rows), options, per_node=4, lengths=dict.fromkeys(names, 20.0))
    zipf = 1e9 / np.arange(10, rows + 10)
    spread = np.empty(rows)
    spread[spread_places(rows)] = zipf
    chosen = {}
    for name, counts in (("even", np.ones(rows)), ("hot", zipf), ("spread", spread)):
        lookups = dict.fromkeys(names, RowLookups(counts, 0, rows))
        chosen[name] = {o.sharding_type for o in plan_case(replace(even, lookups=lookups)).found.options}
    assert chosen == {"even": {"row_wise"}, "hot": {"table_wise"}, "spread": {"row_wise"}}


def test_the_planner_counts_the_busiest_block_and_says_so() -> None:
    rows = 4_000_000
    by_rows = ["--sharding.per_table={big: {types: [row_wise]}}", "--train.batch_size=65536"]
    even = make_case({"big": rows, "small": 1000}, by_rows, per_node=8)
    hot = replace(even, lookups={"big": RowLookups(1e9 / np.arange(1, rows + 1), 0, rows)})
    plans = {name: plan_case(case) for name, case in (("even", even), ("hot", hot))}
    lookup = {name: plan.estimate.step.lookup for name, plan in plans.items()}
    assert lookup["hot"] > 2 * lookup["even"]
    option = next(o for o in plans["hot"].found.options if o.name == "big")
    assert busy_shares(hot, option)[0] > 4 and sum(busy_shares(hot, option)) == pytest.approx(even.world.size)
    said = {name: table_plans(plan.case, plan.found)[0].why for name, plan in plans.items()}
    assert "blocks of rows gets" in said["hot"] and "spread_ids: true" in said["hot"]
    assert "blocks of rows gets" not in said["even"]


def test_what_if_times_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    tables = tmp_path / "tables.yaml"
    tables.write_text("tables: [{name: a, rows: 1000}, {name: b, rows: 50}]\n")
    out = tmp_path / "j.json"
    command = ["--tables", str(tables), "--what-if", "1x2,2x2", "--total-rows", "5e6", "--over_arch.name=mlp"]
    assert main([*command, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    for world in found["worlds"]:
        days = 5e6 / world["samples_per_s"] / 86_400
        assert list(world["days"].values()) == pytest.approx([days, 10 * days, 1000 * days])
        assert next(iter(world["days"])) == "5e+06"
    assert found["total_rows"] == 5e6
