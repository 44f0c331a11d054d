"""tools/gpu_check.py: its steps one by one, and the whole of it in small on the CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tools.gpu_check import Step, main, run_step, steps


def test_all_steps_together_take_at_most_ten_minutes(tmp_path: Path) -> None:
    todo = steps(tmp_path, "cuda")
    assert sum(step.limit_s for step in todo) <= 600
    names = [step.name for step in todo]
    assert len(set(names)) == len(names) and names == [step.name for step in steps(tmp_path, "cpu")]


@pytest.mark.parametrize(
    ("code", "limit_s", "needs", "status", "said"),
    [
        ("print('{\"a\": 1}')", 20, (), "passed", ""),
        ("raise SystemExit('it hurts')", 20, (), "failed", "it hurts"),
        ("import time; print('on', flush=True); time.sleep(60)", 2, (), "timed out", "on"),
        ("print(1)", 20, ("no_such_module",), "skipped", "this machine has no no_such_module"),
    ],
)
def test_what_becomes_of_a_step(
    tmp_path: Path, code: str, limit_s: int, needs: tuple[str, ...], status: str, said: str
) -> None:
    begun = time.perf_counter()
    outcome = run_step(Step("a step", [sys.executable, "-c", code], limit_s, needs), tmp_path)
    assert (outcome.status, outcome.said) == (status, said)
    assert outcome.figures == ({"a": 1} if status == "passed" else None)
    assert time.perf_counter() - begun < 20


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert main(["--out", str(tmp_path / "new"), "--only", "nothing"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("is there") and "no such step; steps: calibration" in second
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_whole_of_it_runs_in_small_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    # Compiling takes a minute here, and its command differs from that before it by one flag.
    names = [step.name for step in steps(out, "cpu") if step.name != "over-archs compiled"]
    code = main(["--out", str(out), "--device", "cpu", "--only", *names])
    found = json.loads((out / "gpu_check.json").read_text())
    assert code == 0, {step["name"]: step["said"] for step in found["steps"] if step["status"] != "passed"}
    assert [step["name"] for step in found["steps"]] == names
    by_name = {step["name"]: step for step in found["steps"]}
    assert by_name["calibration"]["figures"]["measured"]["fp32_tflops"] > 0
    assert "resumed from" in (out / "resumed_on_the_CPU.log").read_text()
    assert (out / "artifact").is_dir()
    assert f"| {names[-1]} | passed |" in (out / "gpu_check.md").read_text()
