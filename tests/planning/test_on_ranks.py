"""Plans against real CPU ranks: the bytes that the shards have, and where they lie."""

from pathlib import Path
from typing import Any

import pytest

from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.plan_file import plan_of, read_plan, write_plan
from ssr_rec.planning.cases import Case, make_world
from ssr_rec.planning.hardware import load_hardware
from ssr_rec.planning.remedies import Planned, plan_case
from ssr_rec.runs.folder import read_metrics
from tests.planning.jobs import losses_job, measured_job, refusal_job
from tests.planning.small import SMALL
from tests.ranks import run_ranks

PARTS = "--sharding.per_table={user: {types: [column_wise], min_partition: 4}}"


def plan_cpu(dataset: Path, overrides: list[str], ranks: int) -> Planned:
    case = Case(load_config(None, overrides), Schema.read(dataset), {}, make_world(1, ranks, load_hardware("cpu")))
    return plan_case(case)


def save(planned: Planned, path: Path) -> str:
    write_plan(plan_of(planned.found.options, "cpu", planned.case.world.size, planned.case.world.per_node), path)
    return f"--sharding.plan={path}"


def shards_of(path: str, rank: int) -> list[Any]:
    """What a plan file says lies on a rank."""
    plan = read_plan(path.removeprefix("--sharding.plan="))
    return sorted(
        (name, tuple(shard.offset), tuple(shard.size))
        for name, table in plan.tables.items()
        for shard in table.shards
        if shard.rank == rank
    )


def check_bytes(dataset: Path, folder: Path, overrides: list[str], ranks: int) -> None:
    """The job follows the saved plan, and every rank's tensors have the bytes the plan says, within 5 %."""
    plain = [o for o in overrides if not o.startswith("--sharding.per_table")]
    planned = plan_cpu(dataset, overrides, ranks)
    saved = save(planned, folder / f"plan{ranks}.json")
    measured = run_ranks(measured_job, ranks, [*plain, saved], str(dataset))
    for rank, (real, memory) in enumerate(zip(measured, planned.estimate.memory, strict=True)):
        assert real["shards"] == shards_of(saved, rank)
        assert real["weights"] == pytest.approx(memory.weights, rel=0.05)
        assert real["state"] == pytest.approx(memory.optimizer, rel=0.05)
    assert sum(real["weights"] for real in measured) > 0


@pytest.mark.slow
def test_planned_bytes_are_the_tensors_of_two_ranks(dataset: Path, tmp_path: Path) -> None:
    check_bytes(dataset, tmp_path, [*SMALL, "--embeddings.dim=8", PARTS], 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["--embeddings.dim=16"]),
        (4, ["--embeddings.dims={user: 16, item: 8}", "--embeddings.dim=4"]),
        (2, ["--embeddings.dim=8", "--embeddings.optimizer=adagrad", PARTS]),
        (2, ["--embeddings.dim=8", "--embeddings.optimizer=sgd"]),
        (2, ["--embeddings.dim=8", "--embeddings.dtype=fp16"]),
    ],
)
def test_planned_bytes_are_the_tensors(dataset: Path, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    check_bytes(dataset, tmp_path, [*SMALL, *overrides], ranks)


@pytest.mark.slow
def test_replicated_tables_are_planned_whole_on_every_rank(dataset: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "--embeddings.dim=8", "--embeddings.optimizer=adam"]
    planned = plan_cpu(dataset, overrides, 2)
    saved = save(planned, tmp_path / "plan.json")
    for real, memory in zip(
        run_ranks(measured_job, 2, [*overrides, saved], str(dataset)), planned.estimate.memory, strict=True
    ):
        assert real["weights"] == memory.weights == 4 * 8 * (50 + 30 + 30 + 8 + 12)
        assert memory.optimizer == 2 * memory.weights


@pytest.mark.slow
def test_a_plan_changes_where_tables_lie_and_not_what_is_learned(dataset: Path, tmp_path: Path) -> None:
    """Everything on rank 1 by a saved plan, against the planner of the job: the same losses to float rounding."""
    run = [
        *SMALL,
        "--embeddings.dim=8",
        "--train.batch_size=64",
        "--train.epochs=2",
        "--train.eval_every=null",
        "--train.log_every=1",
        f"--data.path={dataset}",
        f"--runs={tmp_path}",
    ]
    plan = plan_of(plan_cpu(dataset, run, 2).found.options, "cpu", 2, 2)
    for table in plan.tables.values():
        for index, shard in enumerate(table.shards):
            table.shards[index] = shard.model_copy(update={"rank": 1})
    write_plan(plan, tmp_path / "plan.json")
    saved = f"--sharding.plan={tmp_path / 'plan.json'}"
    lies = run_ranks(measured_job, 2, [*run, saved], str(dataset))
    assert [len(real["shards"]) for real in lies] == [0, 5]
    run_ranks(losses_job, 2, [*run, "--name=free"])
    run_ranks(losses_job, 2, [*run, saved, "--name=planned"])
    free, planned = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["split"] == "train"]
        for name in ("free", "planned")
    )
    assert len(free) == 2 * 16
    assert planned == pytest.approx(free, rel=1e-6)


@pytest.mark.slow
def test_every_rank_says_why_a_plan_is_refused(dataset: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "--embeddings.dim=8"]
    saved = save(plan_cpu(dataset, overrides, 4), tmp_path / "plan.json")
    refusals = run_ranks(refusal_job, 2, [*overrides, saved], str(dataset))
    assert refusals[0] == refusals[1]
    assert "ranks: planned 4, here 2; ranks on a host: planned 4, here 2" in refusals[0]
