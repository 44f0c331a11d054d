"""The literal launcher: a worker that is killed is started again with its peers, and the job resumes by itself."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.harness import options, report_of, steps_done
from tests.jobs import train_job
from tests.ranks import free_port, run_ranks

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]


def start(arguments: list[str], retries: int, output: Path, shape: str = "1x2") -> subprocess.Popen:
    command = [Path(sys.executable).parent / "torchx", "run", "dist.ddp", "-j", shape]
    # Several agents meet at a port that must not be another test's.
    command += ["--rdzv_port", str(free_port()), "--max_retries", str(retries), "ssr_rec/train.py", *arguments]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)


def workers(runs: Path) -> list[int]:
    """Processes whose command line trains into ``runs``, without the launchers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--runs={runs}".encode() in command and b"torchrun" not in b" ".join(command) and b"bash" not in command:
            found.append(int(folder.name))
    return sorted(found)


def wait_for(condition, job: subprocess.Popen, output: Path, timeout: float = 180) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert job.poll() is None and time.monotonic() < until, output.read_text()[-3000:]
        time.sleep(0.01)


def test_a_killed_worker_is_restarted_and_the_job_ends_as_if_undisturbed(dataset, tmp_path):
    """Without a name, too: the restarted job finds its own run folder."""
    runs, output = tmp_path / "runs", tmp_path / "out"
    arguments = [o for o in options(dataset, runs, "--train.epochs=30") if not o.startswith("--name")]
    job = start(arguments, 2, output)

    def metrics() -> list[Path]:
        return list(runs.glob("*/metrics.jsonl"))

    for step in (20, 200):
        wait_for(lambda: metrics() and metrics()[0].read_bytes().count(b"\n") >= step, job, output)  # noqa: B023
        os.kill(workers(runs)[-1], signal.SIGKILL)
    assert job.wait(240) == 0, output.read_text()[-3000:]
    assert output.read_text().count("resumed from") == 2
    (folder,) = runs.iterdir()
    whole = run_ranks(train_job, 2, options(dataset, tmp_path / "whole", "--train.epochs=30"))[0]
    assert json.loads((folder / "report.json").read_text())["test"] == whole["test"]


@pytest.mark.parametrize(("shape", "epochs"), [("1x2", 30), ("2x2", 6)])
def test_preemption_of_the_launcher_writes_a_checkpoint(dataset, tmp_path, shape, epochs):
    """SIGTERM reaches the workers through one or two torchruns; the same command goes on from their checkpoint."""
    runs, output, ranks = tmp_path / "runs", tmp_path / "out", math.prod(map(int, shape.split("x")))
    arguments = options(dataset, runs, f"--train.epochs={epochs}", "--checkpoint.every_steps=100000")
    job = start(arguments, 0, output, shape)
    wait_for(lambda: steps_done(runs) >= 20, job, output)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) != 0
    until = time.monotonic() + 60
    while workers(runs) and time.monotonic() < until:
        time.sleep(0.1)
    assert not workers(runs), "a worker outlives the launcher"
    assert list((runs / "run" / "checkpoints").glob("step-*")), output.read_text()[-3000:]
    assert start(arguments, 0, output, shape).wait(240) == 0
    assert "resumed from" in output.read_text() and report_of(runs)["world_size"] == ranks
    whole = run_ranks(train_job, ranks, options(dataset, tmp_path / "whole", f"--train.epochs={epochs}"))[0]
    # The undisturbed run has one host of all ranks: another plan and other threads, hence another rounding, than two.
    tolerance = 0 if shape == "1x2" else 1e-6
    for task, metrics in whole["test"].items():
        assert report_of(runs)["test"][task] == pytest.approx(metrics, rel=0, abs=tolerance)
