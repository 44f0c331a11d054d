"""SIGTERM, a stalled rank, a full disk, a damaged checkpoint."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ssr_rec.training.stall_watch import PREEMPTED, STALLED
from tests.faults.harness import Job, options, report_of, steps_done, wait_until
from tests.jobs import refused_job, train_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> dict:
    return run_ranks(train_job, 2, options(dataset, tmp_path_factory.mktemp("undisturbed")))[0]


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (None, [signal.SIGTERM]),
        ([0], [signal.SIGTERM]),
        ([1], [signal.SIGTERM]),
        (None, [signal.SIGINT]),
        (None, [signal.SIGINT, signal.SIGINT, signal.SIGTERM]),
    ],
    ids=["all", "rank0", "rank1", "ctrl-c", "terminal and launcher"],
)
def test_asked_to_stop_a_run_writes_a_checkpoint_and_ends_with_its_own_code(
    dataset, tmp_path, undisturbed, ranks, kinds
):
    arguments = options(dataset, tmp_path / "runs", "--checkpoint.every_steps=1000")
    job = Job(arguments, 2, tmp_path)
    assert wait_until(lambda: steps_done(tmp_path / "runs") >= 13, job)
    for kind in kinds:
        job.send(kind, ranks)
    assert job.wait(60) == [PREEMPTED, PREEMPTED], job.said()
    assert "Traceback" not in job.said()
    assert "asked to stop at step" in job.said()
    names = [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").glob("step-*")]
    assert len(names) == 1 and names[0] >= f"step-{12:09d}"
    job = Job(arguments, 2, tmp_path)
    assert job.wait() == [0, 0] and f"{names[0]}, step" in job.said()
    assert report_of(tmp_path / "runs")["test"] == undisturbed["test"]


@pytest.mark.parametrize("stalled", [0, 1])
def test_a_stalled_rank_is_named_in_time(dataset, tmp_path, undisturbed, stalled):
    arguments = options(dataset, tmp_path / "runs", "--train.stall_timeout_s=3")
    job = Job(arguments, 2, tmp_path)
    assert wait_until(lambda: steps_done(tmp_path / "runs") >= 13, job)
    job.send(signal.SIGSTOP, [stalled])
    other = job.processes[1 - stalled]
    other.join(30)
    assert other.exitcode == STALLED, job.said()
    said = job.outputs[1 - stalled].read_text()
    assert "no progress for" in said and "train.stall_timeout_s=3" in said
    # The job's store lies with rank 0 here; under torchrun the agent has it.
    expected = "rank 1 (host" if stalled else "the process that hosts the job's store does not answer"
    assert expected in said, said
    job.send(signal.SIGKILL)
    job.wait(10)
    assert run_ranks(train_job, 2, arguments)[0]["test"] == undisturbed["test"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command here")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but ``leave`` bytes."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(b"\0" * max(0, free - leave))
    return ballast


BIG = ["--embeddings.dim=512", "--embeddings.optimizer=sgd", "--train.epochs=8", "--train.eval_every=null"]
BIG += ["--checkpoint.keep=1"]


def test_a_full_disk_does_not_end_the_run_and_loses_nothing(dataset, small_disk, tmp_path):
    """Checkpoints fail for a while, then the disk has room again; killed in between, the last good one is used."""
    runs = small_disk / "runs"
    arguments = options(dataset, runs, *BIG)
    job = Job(arguments, 2, tmp_path)
    assert wait_until(lambda: steps_done(runs) >= 8, job)
    fill(small_disk, leave=200_000)
    assert wait_until(lambda: "checkpoint NOT written, training goes on" in job.said(), job)
    assert "No space left on device" in job.said()
    job.send(signal.SIGKILL)
    job.wait(20)
    (small_disk / "ballast").unlink()
    kept = [path.name for path in (runs / "run" / "checkpoints").glob("step-*")]
    assert kept, "the checkpoints from before the disk was full are still there"
    job = Job(arguments, 2, tmp_path)
    assert job.wait() == [0, 0], job.said()
    assert "resumed from" in job.said()
    elsewhere = run_ranks(train_job, 2, options(dataset, tmp_path / "elsewhere", *BIG))[0]
    assert report_of(runs)["test"] == elsewhere["test"]


def test_a_failed_save_leaves_nothing_half_written(dataset, small_disk, tmp_path):
    runs = small_disk / "runs"
    arguments = options(dataset, runs, *BIG)
    job = Job(arguments, 2, tmp_path)
    assert wait_until(lambda: steps_done(runs) >= 8, job)
    ballast = fill(small_disk, leave=200_000)
    assert wait_until(lambda: "checkpoint NOT written" in job.said(), job)
    ballast.unlink()
    assert job.wait() == [0, 0], job.said()
    assert not list((runs / "run" / "checkpoints").glob(".*"))


DAMAGE = {
    "data file missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "data file cut short": lambda folder: os.truncate(next(folder.glob("*.distcp")), 1000),
    "one bit of data flipped": lambda folder: flip(next(folder.glob("*.distcp"))),
    "metadata missing": lambda folder: (folder / ".metadata").unlink(),
    "one bit of metadata flipped": lambda folder: flip(folder / ".metadata"),
    "marker missing": lambda folder: (folder / "checkpoint.json").unlink(),
    "one bit of the marker flipped": lambda folder: flip(folder / "checkpoint.json"),
    "marker empty": lambda folder: (folder / "checkpoint.json").write_bytes(b""),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def interrupted(dataset, tmp_path_factory) -> Path:
    """A run killed at step 30 or so, with two training checkpoints."""
    runs = tmp_path_factory.mktemp("interrupted") / "runs"
    job = Job(options(dataset, runs), 2, runs.parent)
    assert wait_until(lambda: steps_done(runs) >= 30, job)
    job.send(signal.SIGKILL)
    job.wait(20)
    for folder in sorted((runs / "run" / "checkpoints").glob("step-*"))[:-2]:
        shutil.rmtree(folder)  # the kill came after a new one was there and before the oldest was gone
    return runs


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(dataset, tmp_path, interrupted, undisturbed, damage):
    runs = shutil.copytree(interrupted, tmp_path / "runs")
    older, newer = sorted((runs / "run" / "checkpoints").glob("step-*"))
    DAMAGE[damage](newer)
    job = Job(options(dataset, runs), 2, tmp_path)
    assert job.wait() == [0, 0], job.said()
    said = job.outputs[0].read_text()
    assert "skipped a checkpoint" in said and newer.name in said and f"resumed from {older}" in said
    assert report_of(runs)["test"] == undisturbed["test"]


def test_without_a_good_checkpoint_the_run_is_refused(dataset, tmp_path, interrupted):
    runs = shutil.copytree(interrupted, tmp_path / "runs")
    for folder in (runs / "run" / "checkpoints").glob("step-*"):
        DAMAGE["one bit of data flipped"](folder)
    for message in run_ranks(refused_job, 2, options(dataset, runs)):
        assert "no good checkpoint among 2" in message and "damaged: its contents changed" in message


def test_lost_best_weights_are_looked_for_anew(dataset, tmp_path, interrupted):
    runs = shutil.copytree(interrupted, tmp_path / "runs")
    for folder in (runs / "run" / "checkpoints").glob("best-*"):
        shutil.rmtree(folder)
    job = Job(options(dataset, runs), 2, tmp_path)
    assert job.wait() == [0, 0] and "the best weights so far are lost" in job.said()
