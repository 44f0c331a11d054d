"""A training with histories and row-wise tables that is killed goes on, on other numbers of ranks too."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.runs.folder import read_metrics
from tests.days_log import options as days_options
from tests.faults.harness import Job, is_saving, steps_done, wait_until
from tests.histories import SPEC, random_log, write
from tests.jobs import train_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.faults

MORE = [
    *("--over_arch.name=mlp", "--over_arch.hidden=[16]", "--checkpoint.every_steps=2", "--sharding.types=[row_wise]"),
    "--sequences={clicked: {encoder: {name: transformer, num_heads: 2, dim: 16}}, seen: {encoder: {name: din}}}",
]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of five days with two histories made from it, which go on across the days."""
    folder = tmp_path_factory.mktemp("days")
    log = random_log(0, 1500)
    log["day"] = log["time"] // 8
    spec = {**SPEC, "group_id": "user", "ignore": ["row"], "split": {"type": "days", "column": "day"}}
    prepare(write(log, folder / "log", 2), folder / "data", make_spec(spec, "spec"))
    return folder / "data"


def options(days: Path, runs: Path) -> list[str]:
    plain = [option for option in days_options(days, runs) if "view" not in option]
    return [*plain, *MORE]


def losses(runs: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(runs / "run" / "metrics.jsonl") if row["split"] == "train"])


@pytest.fixture(scope="module")
def undisturbed(days: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], np.ndarray]:
    runs = tmp_path_factory.mktemp("undisturbed")
    report = run_ranks(train_job, 1, options(days, runs))[0]
    return report, losses(runs)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 2), (2, 3)])
def test_killed_and_resumed_on_other_numbers_of_ranks(
    days: Path, tmp_path: Path, undisturbed: tuple[dict[str, Any], np.ndarray], numbers: tuple[int, int]
) -> None:
    rng, (report, wanted) = random.Random(numbers[0]), undisturbed
    arguments = options(days, tmp_path / "runs")
    step, saving = rng.randrange(2, len(wanted) - 8), rng.random() < 0.5
    job = Job(arguments, numbers[0], tmp_path)
    wait_until(lambda: steps_done(tmp_path / "runs") >= step and (not saving or is_saving(tmp_path / "runs")), job)
    time.sleep(rng.uniform(0.0, 0.02))
    job.send(signal.SIGKILL)
    assert any(code == -9 for code in job.wait(60)), f"killed too late:\n{job.said()}"
    resumed = run_ranks(train_job, numbers[1], arguments)[0]
    assert resumed["steps"] == report["steps"] == len(wanted)
    assert np.abs(losses(tmp_path / "runs") - wanted).max() < 1e-5
    for mine, theirs in zip(resumed["days"], report["days"], strict=True):
        assert (mine["day"], mine["step"]) == (theirs["day"], theirs["step"])
        assert mine["tasks"]["click"]["auc"] == pytest.approx(theirs["tasks"]["click"]["auc"], abs=1e-3)
