"""The plan file: what is written is read, what was changed or is not a plan is refused, differences are all named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrec.distributed.types import ShardingPlan

from ssr_rec.config.sharding import ShardingConfig
from ssr_rec.embeddings.plan_file import (
    PlanFile,
    fingerprint,
    plan_differences,
    plan_of,
    read_plan,
    sharding_plan,
    write_plan,
)
from ssr_rec.embeddings.sharding import build_topology, plan_sharding
from ssr_rec.embeddings.tables import build_tables
from ssr_rec.planning.costs import Model
from ssr_rec.planning.remedies import plan_case
from tests.planning.small import make_case, make_schema

ROWS = {"a": 1000, "b": 640, "c": 64}


def make_plan(device: str = "cuda", nodes: int = 2, overrides: tuple[str, ...] = (), **rows: int) -> PlanFile:
    """Three tables on two ranks a host, cut in three ways on GPUs."""
    ways = "{a: {types: [row_wise]}, b: {types: [table_row_wise]}, c: {types: [table_wise]}}"
    kind = [f"--sharding.per_table={ways}"] if device == "cuda" else []
    hardware = "a100_80g" if device == "cuda" else "cpu"
    case = make_case({**ROWS, **rows}, [*kind, *overrides], nodes=nodes, hardware=hardware)
    return plan_of(plan_case(case).found.options, device, case.world.size, case.world.per_node)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> PlanFile:
    return make_plan()


def test_what_is_written_is_read(plan: PlanFile, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert read.tables == plan.tables
    assert read.fingerprint == fingerprint(plan)
    assert [(s.rank, s.offset, s.size) for s in read.tables["a"].shards] == [
        (rank, [250 * rank, 0], [250, 16]) for rank in range(4)
    ]
    ranks = [shard.rank for shard in read.tables["b"].shards]
    assert ranks in ([0, 1], [2, 3])


def test_torchrec_gets_the_shards_and_devices_of_the_file(plan: PlanFile) -> None:
    tables = sharding_plan(plan, dict.fromkeys(plan.tables, "model.tables")).plan["model.tables"]
    a = tables["a"]  # type: ignore[index]
    assert (a.sharding_type, a.compute_kernel, a.ranks) == ("row_wise", "fused", [0, 1, 2, 3])
    placed = [(s.shard_offsets, s.shard_sizes, str(s.placement)) for s in a.sharding_spec.shards]
    assert placed == [([250 * r, 0], [250, 16], f"rank:{r}/cuda:{r % 2}") for r in range(4)]


def change(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(("tables", "a", "shards", 1, "rank"), 7), "tables.a: a shard on rank 7 of 4 ranks"),
        (change(("tables", "a", "shards", 1, "rank"), 2), "one shard on every rank, in their order"),
        (change(("tables", "a", "shards", 1, "offset"), [251, 0]), "do not make up its 1000 rows"),
        (change(("tables", "a", "shards", 3, "size"), [251, 16]), "do not make up its 1000 rows"),
        (change(("tables", "a", "shards", 0, "size"), [250, 8]), "a shard is not whole otherwise"),
        (change(("tables", "b", "shards", 0, "rank"), 1), "on the ranks of one host"),
        (change(("tables", "c", "shards"), []), "tables.c: it has no shards"),
        (change(("tables", "c", "kernel"), "dense"), "kernel dense does not go with table_wise"),
        (change(("tables", "c", "kernel"), "os.system"), "tables.c.kernel"),
        (change(("tables", "c", "rows"), 65), "tables.c"),
        (change(("tables", "c", "dtype"), "fp16"), "changed since it was written"),
        (change(("fingerprint",), "0" * 64), "changed since it was written"),
        (change(("format_version",), 2), "format_version"),
        (change(("world_size",), 2**70), "not JSON of plain values"),
        (change(("extra",), 1), "extra"),
    ],
)
def test_a_changed_file_is_refused(
    plan: PlanFile, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "plan.json"
    write_plan(plan, path)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        read_plan(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": NaN}', '{"a": 1, "a": 1}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan.json: not"):
        read_plan(path)


def test_every_difference_is_named(plan: PlanFile) -> None:
    other = make_plan("cpu", 1, ("--embeddings.dims={b: 8}", "--embeddings.dtypes={c: fp16}"), a=1001, d=5)
    del other.tables["c"]
    other.tables["e"] = other.tables["d"]
    del other.tables["d"]
    assert plan_differences(plan, other) == [
        "device: planned cuda, here cpu",
        "ranks: planned 4, here 2",
        "table c: planned, not in this model",
        "table a: rows planned 1000, here 1001",
        "table b: columns planned 16, here 8",
        "table e: in this model, not planned",
    ]
    assert plan_differences(plan, plan) == []
    half = make_plan(overrides=("--embeddings.dtypes={c: fp16}",))
    assert plan_differences(plan, half) == ["table c: dtype planned fp32, here fp16"]


def follow(path: Path, overrides: tuple[str, ...] = (), world_size: int = 2, **sharding: Any) -> ShardingPlan:
    """What the training job makes of a plan file, on CPU."""
    case = make_case(ROWS, list(overrides), hardware="cpu")
    tables = build_tables(make_schema(ROWS), case.config.embeddings, "cpu")
    config = ShardingConfig(plan=str(path), **sharding)
    topology = build_topology(config, "cpu", world_size, world_size)
    fused = case.config.embeddings.is_fused
    return plan_sharding(Model(tables), list(ROWS), config, topology, fused, 64)


def test_a_job_follows_a_plan_or_says_why_not(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(make_plan("cpu", 1), path)
    assert set(follow(path).plan["tables"]) == set(ROWS)  # type: ignore[call-overload]
    replicated = ("--embeddings.optimizer=adam",)
    write_plan(make_plan("cpu", 1, replicated), tmp_path / "replicated.json")
    tables = follow(tmp_path / "replicated.json", replicated).plan["tables"]
    assert {(t.sharding_type, t.sharding_spec) for t in tables.values()} == {("data_parallel", None)}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"plan.json is not for this job: ranks: planned 2, here 4; ranks on a host"):
        follow(path, world_size=4)
    with pytest.raises(ValueError, match=r"not for this job: tables a, b, c: columns planned 16, here 8. Make"):
        follow(path, ("--embeddings.dim=8",))
    with pytest.raises(ValueError, match="planned sharded, with its optimizer in the backward pass; here replicated"):
        follow(path, ("--embeddings.optimizer=adam",))
    with pytest.raises(ValueError, match=r"sharding.types has no effect beside sharding.plan"):
        follow(path, types=["table_wise"])
    rows = make_plan("cpu", 1)
    a = rows.tables["a"].model_copy(
        update={"sharding_type": "row_wise", "shards": make_plan(nodes=1).tables["a"].shards}
    )
    write_plan(rows.model_copy(update={"tables": {**rows.tables, "a": a}}), path)
    with pytest.raises(ValueError, match="table a: row_wise is not supported on cpu"):
        follow(path)


def test_a_plan_of_gpu_ranks_is_not_for_cpu_ranks(plan: PlanFile, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "plan.json")
    with pytest.raises(ValueError, match="device: planned cuda, here cpu") as error:
        follow(tmp_path / "plan.json")
    assert "Make it anew with tools/plan_sharding.py --save" in str(error.value)
