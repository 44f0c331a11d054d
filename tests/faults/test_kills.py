"""A two-process run is killed at random moments; what goes on from there ends as if nothing had happened."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.faults.harness import STEPS, Job, hurt_at_random, options
from tests.jobs import train_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.faults

KILLS = (
    [("start", None)] * 4
    + [("step", None)] * 8
    + [("save", None)] * 12
    + [("step", [0])] * 3
    + [("step", [1])] * 3
    + [("save", [0])] * 2
    + [("save", [1])] * 2
)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> dict:
    return run_ranks(train_job, 2, options(dataset, tmp_path_factory.mktemp("undisturbed")))[0]


@pytest.mark.parametrize(("number", "moment", "ranks"), [(n, *kill) for n, kill in enumerate(KILLS)])
def test_killed_and_resumed_ends_as_if_undisturbed(dataset, tmp_path, undisturbed, number, moment, ranks):
    rng = random.Random(number)
    arguments = options(dataset, tmp_path / "runs", f"--checkpoint.asynchronous={'true' if number % 2 else 'false'}")
    job = Job(arguments, 2, tmp_path)
    hurt_at_random(job, tmp_path / "runs", rng, moment, ranks)
    codes = job.wait(60)  # where one rank was killed, the other must end by itself
    assert any(code == -9 for code in codes), f"killed too late: {codes}"
    report = run_ranks(train_job, 2, arguments)[0]
    assert report["steps"] == STEPS
    for key in ("test", "validation", "best_step"):
        assert report[key] == undisturbed[key]
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")]


def die_before_the_config(rank: int) -> None:
    rename = os.replace

    def replace(source, target):
        if Path(target).name == "config.yaml":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace


def test_killed_before_the_run_folder_had_its_config(dataset, tmp_path, undisturbed):
    arguments = options(dataset, tmp_path / "runs")
    codes = Job(arguments, 2, tmp_path, die_before_the_config).wait(60)
    assert codes[0] == -9
    assert [path.suffix for path in (tmp_path / "runs" / "run").iterdir()] == [".partial"]
    assert run_ranks(train_job, 2, arguments)[0]["test"] == undisturbed["test"]
    assert not list((tmp_path / "runs" / "run").glob(".*"))


OPTIMISATION = (
    *("--optimizer.matrices=muon", "--optimizer.ema_decay=0.9", "--optimizer.warmup_steps=5"),
    *("--optimizer.schedule={name: cosine, steps: 40}", "--embeddings.schedule={name: step, steps: 9, factor: 0.5}"),
)
UNCERTAIN = (
    *("--train.task_weighting=uncertainty", "--optimizer.schedule={name: polynomial, steps: 45, end: 0.1}"),
    *("--embeddings.schedule={name: linear, steps: 40}", "--optimizer.ema_decay=0.8"),
)
ADAPTIVE = (
    *("--over_arch.filter=adaptive", "--over_arch.adapt_every=3", "--over_arch.adapt_until=45"),
    "--over_arch.adapt_threshold=0",
    *("--optimizer.schedule={name: step, steps: 9, factor: 0.5}", "--embeddings.schedule={name: cosine, steps: 40}"),
)
LINEAR = (
    "--optimizer.schedule={name: linear, steps: 40}",
    "--embeddings.schedule={name: polynomial, steps: 45, end: 0.1}",
)


@pytest.mark.parametrize(
    "more",
    [OPTIMISATION, UNCERTAIN, ADAPTIVE, LINEAR],
    ids=["muon, schedules and averages", "uncertainties, other schedules", "views whose dims move", "linear"],
)
def test_killed_with_further_state_ends_as_if_undisturbed(dataset, tmp_path, more):
    whole = run_ranks(train_job, 2, options(dataset, tmp_path / "whole", *more))[0]
    assert more is not ADAPTIVE or whole["over_arch"]["filters"]["closed_fields"], "no dim has moved"
    arguments = options(dataset, tmp_path / "runs", *more)
    for attempt, moment in enumerate(("step", "save")):
        job = Job(arguments, 2, tmp_path)
        hurt_at_random(job, tmp_path / "runs", random.Random(200 + attempt), moment, None)
        job.wait(60)
    report = run_ranks(train_job, 2, arguments)[0]
    for key in ("steps", "test", "validation", "best_step"):
        assert report[key] == whole[key]


def test_killed_again_and_again(dataset, tmp_path, undisturbed):
    """Every start gets some steps further; the last one is left alone."""
    arguments = options(dataset, tmp_path / "runs")
    for attempt in range(4):
        job = Job(arguments, 2, tmp_path)
        hurt_at_random(job, tmp_path / "runs", random.Random(100 + attempt), "step", None)
        job.wait(60)
    assert run_ranks(train_job, 2, arguments)[0]["test"] == undisturbed["test"]
