"""Runs on one GPU all that never ran on one: ``python tools/gpu_check.py --out DIR``; docs/performance.md.

Each step is a command of its own under a time limit, all together at most ten minutes, and none needs the internet:
the kernels' tests, what the device really does, operators and over-archs against plain PyTorch (eager and compiled,
fp32 and bf16), a training job with NCCL, its resume on the CPU, an artifact of it, and the planner's estimate of it. A
step whose libraries this machine lacks (FBGEMM for CUDA, say) is skipped with the reason; a failed one keeps its last
lines. Writes DIR/gpu_check.json, DIR/gpu_check.md and each step's output, after every step, so that a lost machine
loses one. ``--device cpu`` is the same in small, to see that the commands are right.

Exit code: 0 no step failed, 1 one did, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 25
JOB = ("torch", "torchrec", "fbgemm_gpu", "pydantic", "pyarrow")
"""Modules that a training job needs."""
OVER_ARCHS = (
    "mlp:hidden=[320,320,320]",
    "ssr:filter=static,num_views=8,view_dim=128",
    "ssr:filter=dynamic,num_views=4,view_dim=128",
    "rankmixer",
)


@dataclass(frozen=True)
class Step:
    """Is one command; ``limit_s`` are seconds, ``needs`` modules without which it is skipped."""

    name: str
    command: list[str]
    limit_s: int
    needs: tuple[str, ...] = ("torch", "pydantic")


@dataclass
class Outcome:
    """Says what became of a step."""

    name: str
    status: str  # passed, failed, timed out or skipped
    seconds: float = 0.0
    said: str = ""
    figures: Any = None
    command: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run on one GPU all that never ran on one.")
    parser.add_argument("--out", type=Path, required=True, help="folder for what it finds; must not be there")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the same in small")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    chosen = parser.parse_args(arguments)
    todo = steps(chosen.out.resolve(), chosen.device)
    unknown = sorted(set(chosen.only or ()) - {step.name for step in todo})
    if unknown or (chosen.out.exists() and not chosen.list):
        names = ", ".join(step.name for step in todo)
        what = f"--only {unknown[0]}: no such step; steps: {names}" if unknown else f"--out {chosen.out}: is there"
        print(f"gpu_check: {what}", file=sys.stderr)
        return 2
    todo = [step for step in todo if not chosen.only or step.name in chosen.only]
    if chosen.list:
        for step in todo:
            print(f"{step.name:<22} at most {step.limit_s:>3} s   {' '.join(step.command[1:])}")
        return 0
    chosen.out.mkdir(parents=True)
    done: list[Outcome] = []
    for step in todo:
        print(f"{step.name} ...", file=sys.stderr, flush=True)
        done.append(run_step(step, chosen.out))
        write_results(chosen.out, chosen.device, done)
    print((chosen.out / "gpu_check.md").read_text(), end="")
    return int(any(outcome.status in ("failed", "timed out") for outcome in done))


def steps(out: Path, device: str) -> list[Step]:
    """Return what to run, the most wanted first; on the CPU the same in small."""
    python, cuda = sys.executable, device == "cuda"
    batch, repetitions = ("65536", "11") if cuda else ("64", "1")
    bench = [python, "tools/bench_over_arch.py", "--device", device, "--batch", batch, "--repetitions", repetitions]
    over_archs = ["--over-archs", *OVER_ARCHS]
    runs, name = str(out / "runs"), "gpu-check"
    small = [] if cuda else ["--data.synthetic.train_rows=16384", "--train.batch_size=512"]
    train = [python, "ssr_rec/train.py", "--config", "configs/smoke.yaml", f"--runs={runs}", *small]
    train += [f"--data.synthetic_root={out / 'data'}", "--checkpoint.every_steps=8", "--train.log_every=8"]
    resumed = ["--name=resumed", f"--resume={runs}/{name}", "--device=cpu", "--train.max_steps=24"]
    size = [] if cuda else ["--megabytes", "8", "--rows", "64", "--repetitions", "1"]
    hardware = str(out / "hardware.yaml")
    plan = ["--config", f"{runs}/{name}/config.yaml", "--hardware", hardware, "--nodes", "1", "--gpus-per-node", "1"]
    collect = [] if cuda else ["--collect-only"]
    tests = ["tests/kernels", "tests/training", "tests/tools/test_bench_over_arch.py"]
    todo = [
        Step("calibration", [python, "tools/calibrate_hardware.py", "--device", device, "--out", hardware, *size], 60),
        Step("kernel tests", [python, "-m", "pytest", "-q", "-m", "gpu", *collect, *tests], 150, ("torch", "pytest")),
        Step("operators fp32", [*bench, "--operators", "--over-archs", OVER_ARCHS[0]], 60),
        Step("over-archs fp32", [*bench, *over_archs], 40),
        Step("over-archs bf16", [*bench, *over_archs, "--dtype", "bf16"], 40),
        Step("over-archs compiled", [*bench, *over_archs, "--dtype", "bf16", "--compile"], 90),
        Step("training", [*train, f"--name={name}", f"--device={device}", "--train.max_steps=16"], 60, JOB),
        Step("resumed on the CPU", [*train, *resumed], 40, JOB),
        Step("artifact", [python, "tools/export.py", f"{runs}/{name}", "--out", str(out / "artifact")], 40, JOB),
        Step("planner", [python, "tools/plan_sharding.py", *plan], 20, JOB),
    ]
    return todo if cuda else [replace(step, limit_s=4 * step.limit_s) for step in todo]


def run_step(step: Step, out: Path) -> Outcome:
    """Run a step to its end or its limit; its output goes to a file of its name."""
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome(step.name, "skipped", said=f"this machine has no {', '.join(missing)}", command=step.command)
    log, begun = out / f"{step.name.replace(' ', '_')}.log", time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        # A session of its own, so that what a step started ends with it.
        job = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if job.wait(step.limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _end(job)
    lines = log.read_text(errors="replace").splitlines()
    figures = _last_json(lines)
    said = "\n".join(lines[-TAIL_LINES:]) if status != "passed" or figures is None else ""
    return Outcome(step.name, status, round(time.perf_counter() - begun, 1), said, figures, step.command)


def _end(job: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it and all it started have ended
    finally:
        job.wait()


def _last_json(lines: Sequence[str]) -> Any:
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                return None
    return None


def write_results(out: Path, device: str, done: Sequence[Outcome]) -> None:
    """Write gpu_check.json and gpu_check.md of the steps so far."""
    machine = {"host": platform.platform(), "python": platform.python_version(), "nvidia-smi": _gpu()}
    found = {"device": device, "machine": machine, "steps": [asdict(outcome) for outcome in done]}
    (out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# {machine['nvidia-smi'] or 'no GPU'}, {machine['host']}", "", "| step | | seconds |", "|---|---|--:|"]
    lines += [f"| {one.name} | {one.status} | {one.seconds:.1f} |" for one in done]
    for one in done:
        if one.said:
            lines += ["", f"## {one.name}: {one.status}", "", "```", one.said, "```"]
    (out / "gpu_check.md").write_text("\n".join(lines) + "\n")


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
