"""tools/check_planner.py on a CPU: the jobs are really trained, and what was planned and measured is told of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_planner

WORKER = Path(check_planner.__file__).with_name("check_planner_cpu.py")


@pytest.mark.slow
def test_ten_jobs_are_planned_and_trained() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(WORKER)]
    small = ["--clock", "cpu", "--batch", "128", "--steps", "1", "--turns", "1"]
    done = subprocess.run(
        [*command, *small], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ranks"] == 2 and len(figures["jobs"]) == 10
    assert figures["worst_bytes_error"] < 0.001
    for job in figures["jobs"]:
        assert job["planned_ms"] > 0 and job["measured_ms"] > 0
        assert f"| {job['job']}" in done.stdout
    # Wider products cost more, in the plan as on the ranks.
    by_name = {job["job"]: job for job in figures["jobs"]}
    for key in ("planned_ms", "measured_ms"):
        assert by_name["dim 32, wide MLP"][key] > by_name["dim 32, lists of 2"][key]


def test_a_world_off_by_more_than_the_range_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ended(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ranks = command[command.index("--nproc_per_node") + 1]
        return subprocess.CompletedProcess(command, 0, stdout=f'| a table |\n{{"worst_ratio": 1.{ranks}}}\n')

    monkeypatch.setattr(subprocess, "run", ended)
    assert check_planner.main(["--cpu", "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["worlds"]["2"] == {"worst_ratio": 1.2}
    assert check_planner.main(["--cpu", "--ranks", "1", "6"]) == 1
