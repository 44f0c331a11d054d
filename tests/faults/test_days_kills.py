"""A training by days that is killed at random moments ends with the next-day figures of one that was not."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.days_log import ROWS, options, write_days
from tests.faults.harness import Job, is_saving, steps_done, wait_until
from tests.jobs import train_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.faults

MORE = ["--over_arch.fusion_dropout=0.1", "--checkpoint.every_steps=2", "--train.epochs=2"]
STEPS = sum(2 * -(-rows // 64) for rows in ROWS.values())


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    return write_days(tmp_path_factory.mktemp("days") / "data")


@pytest.fixture(scope="module")
def undisturbed(days, tmp_path_factory):
    return run_ranks(train_job, 2, options(days, tmp_path_factory.mktemp("undisturbed"), *MORE))[0]


def kill(job: Job, runs: Path, rng: random.Random) -> None:
    """SIGKILL to one or both ranks a bit after a random step, or while a checkpoint is being written after it."""
    step, saving = rng.randrange(2, STEPS - 8), rng.random() < 0.5
    wait_until(lambda: steps_done(runs) >= step and (not saving or is_saving(runs)), job)
    time.sleep(rng.uniform(0.0, 0.02))
    job.send(signal.SIGKILL, rng.choice([None, [0], [1]]))


@pytest.mark.parametrize("number", range(3))
def test_killed_by_day_ends_as_if_undisturbed(days, tmp_path, undisturbed, number):
    rng = random.Random(number)
    arguments = options(days, tmp_path / "runs", *MORE)
    for _ in range(2):  # twice in one run: the second time after a resume
        job = Job(arguments, 2, tmp_path)
        kill(job, tmp_path / "runs", rng)
        assert any(code == -9 for code in job.wait(60)), "killed too late"
    report = run_ranks(train_job, 2, arguments)[0]
    assert report["steps"] == STEPS
    for key in ("days", "test", "best_step"):
        assert report[key] == undisturbed[key], key
