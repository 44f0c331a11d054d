"""Measures rows/s and memory from raw log to trained step, each stage in a process of its own.

    python tools/bench_pipeline.py --work /data/bench --rows 1000000 10000000
    python tools/bench_pipeline.py --work /data/bench --rows 1000000 --stages draw train --ranks 1 2
    python tools/bench_pipeline.py --work /data/bench --stages fuxictr --fuxictr-python FUXICTR_VENV/bin/python \\
        --criteo ../shared/data/criteo_small/train_first10k.tsv --ml1m-half ../shared/data/ml1m_half/ratings.parquet

draw: a synthetic log (39 single-valued features and a list). prepare: that log taken for a raw one. read: one shuffled
pass of the reader alone. consume: the reader and a bare Dense MLP 3x320 in turns, per CPU second of one thread. train:
ssr_rec/train.py with that MLP and the time it waits for data, on so many ranks. fuxictr: our preparation and FuxiCTR's
of the same logs in turns. Later stages need the files of earlier ones in --work. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline_figure import draw_figure
from pipeline_logs import FUXICTR_LOGS, Log
from pipeline_stages import OVER_ARCH, peak_mb

from ssr_rec.common.errors import UserError
from ssr_rec.runs.provenance import hardware, versions
from ssr_rec.runs.report import read_report

TOOLS = Path(__file__).parent
STAGES = ("draw", "prepare", "read", "consume", "train", "fuxictr")


def run(command: Sequence[str], threads: int = 1) -> tuple[str, float]:
    """Return what a command printed last, and the most memory in MB that it or a process it started was seen to have.

    Raises:
        ValueError: it failed; the last line of its complaint.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    peak = 0.0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=environment)
        while process.poll() is None:
            peak = max([peak, *(peak_mb(each) for each in family(process.pid))])
            time.sleep(0.05)
        out.seek(0)
        errors.seek(0)
        said = (out.read().strip().splitlines() or [""])[-1]
        lines = errors.read().strip().splitlines() or ["no message"]
        complaint = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} ... ended with {process.returncode}: {complaint}")
    return said, peak


def family(process: int) -> list[int]:
    """Return a process and all that descend from it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(each for child in children for each in family(int(child)))]


def stage(name: str, **options: Any) -> dict[str, Any]:
    """Return the figures of one stage, from a process of its own."""
    said, _ = run([sys.executable, str(TOOLS / "pipeline_stages.py"), name, json.dumps(options)])
    figures = json.loads(said)
    rows = figures["rows"]
    return {
        **figures,
        "rows_per_s": round(rows / figures["seconds"]),
        "rows_per_cpu_s": round(rows / figures["cpu_seconds"]),
    }


def train(data: Path, runs: Path, ranks: int, steps: int, batch_size: int) -> dict[str, Any]:
    """Run the whole job on so many processes of this machine."""
    name = f"{data.name}-{ranks}-{time.time_ns()}"
    job = [
        *(str(TOOLS.parent / "ssr_rec" / "train.py"), f"--runs={runs}", f"--name={name}", f"--data.path={data}"),
        *("--device=cpu", f"--over_arch={json.dumps(OVER_ARCH)}"),
        *(f"--train.max_steps={steps}", f"--train.batch_size={batch_size}", "--train.eval_every=null"),
        *("--checkpoint.every_minutes=null", "--checkpoint.every_steps=null"),
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    _, peak = run([sys.executable, *launch, *job])
    report = read_report(runs / name)
    return {
        "ranks": ranks,
        "rows": steps * batch_size,
        "rows_per_s": round(report.samples_per_s or 0),
        "data_wait": report.data_wait,
        "peak_mb": round(peak),
    }


def against_fuxictr(log: Log, python: str, work: Path, turns: int, memory_limit: str) -> dict[str, Any]:
    """Our preparation of a log and FuxiCTR's in turns: medians of rows/s, our own command included imports."""
    speeds: dict[str, list[float]] = {"ours": [], "fuxictr": []}
    peak = 0.0
    for _ in range(turns):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            options = {"inputs": [str(log.raw)], "output": f"{folder}/ours", "memory_limit": memory_limit}
            ours = stage("prepare_log", **options, preset=log.preset, spec=log.spec)
            peak = max(peak, ours["peak_mb"])
            made = log.write_for_fuxictr(Path(folder))
            said, _ = run([python, str(TOOLS / "fuxictr_prepare.py"), json.dumps(made)], os.cpu_count() or 1)
            theirs = json.loads(said)
        assert theirs["rows"] == ours["rows"]
        speeds["ours"].append(ours["rows_per_s"])
        speeds["fuxictr"].append(theirs["rows"] / theirs["seconds"])
        print(f"{log.name}: ours {speeds['ours'][-1]:,.0f}, FuxiCTR {speeds['fuxictr'][-1]:,.0f} rows/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "rows": ours["rows"],
        "rows_per_s": {name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(v)), round(max(v))] for name, v in speeds.items()},
        "ratio": round(medians["ours"] / medians["fuxictr"], 2),
        "peak_mb": round(peak),
        "versions": theirs["versions"],
    }


def by_rows(name: str, rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of a stage on a log of so many rows; of several turns for training."""
    drawn, prepared = options.work / f"drawn-{rows}", options.work / f"prepared-{rows}"
    data = prepared if prepared.exists() else drawn
    if name == "draw":
        return [stage("draw", rows=rows, output=str(drawn), ids=options.ids)]
    if name == "prepare":
        limit = options.memory_limit
        return [stage("prepare_drawn", drawn=str(drawn), output=str(prepared), memory_limit=limit)]
    if name == "read":
        return [stage("read", data=str(data), batch_size=options.batch_size)]
    if name == "consume":
        turns = {"turns": options.turns, "steps": options.steps}
        return [stage("consume", data=str(data), batch_size=options.batch_size, **turns)]
    # One after the other, again and again: the machine may be slower for a while.
    ranks = [*options.ranks] * options.turns
    return [train(data, options.work / "runs", count, options.steps, options.batch_size) for count in ranks]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures asked for: per stage a list over sizes or ranks, or a mapping over logs."""
    found: dict[str, Any] = {name: [] for name in options.stages}
    for rows in options.rows:
        for name in (stage for stage in STAGES[:-1] if stage in options.stages):
            figures = by_rows(name, rows, options)
            found[name] += figures
            for each in figures:
                print(line(name, each), flush=True)
    if "fuxictr" in options.stages:
        logs = [make(given, options.work) for name, make in FUXICTR_LOGS.items() if (given := getattr(options, name))]
        shared = options.fuxictr_python, options.work, options.turns, options.memory_limit
        found["fuxictr"] = {log.name: against_fuxictr(log, *shared) for log in logs}
    return found


def line(name: str, figures: dict[str, Any]) -> str:
    """Return a row of the table."""
    parts = [f"{name:8s}{figures['rows']:>13,} rows{figures['rows_per_s']:>11,}/s{figures['peak_mb']:>7,} MB"]
    if "rows_per_cpu_s" in figures:
        parts.append(f"{figures['rows_per_cpu_s']:,}/CPU s")
    if "ratio" in figures:
        parts.append(f"reader {figures['reader']:,}, model {figures['model']:,} rows/CPU s: {figures['ratio']} times")
    if "data_wait" in figures:
        parts.append(f"{figures['ranks']} ranks, {100 * figures['data_wait']:.2f} % waiting for data")
    return "  ".join(parts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the stages make; kept")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["draw", "prepare", "read", "consume", "train"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="rows of the log; several: one by one")
    parser.add_argument("--ids", type=int, default=20_000, help="users, and items, of the drawn log")
    parser.add_argument("--memory-limit", default="3GB", help="of the preparation")
    parser.add_argument("--batch-size", type=int, default=2048, help="rows of a global batch")
    parser.add_argument("--turns", type=int, default=3, help="of what is compared")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a turn")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="processes that train")
    parser.add_argument("--fuxictr-python", help="the python of a venv with FuxiCTR (pip install fuxictr==2.3.10)")
    parser.add_argument("--criteo", type=Path, help="a Criteo file, for fuxictr; repeated to 2,000,000 rows")
    parser.add_argument("--ml1m-half", type=Path, help="ratings.parquet of configs/data/ml1m_half.yaml, for fuxictr")
    parser.add_argument("--plot", type=Path, help="picture of rows/s and memory over rows")
    options = parser.parse_args(arguments)
    if "fuxictr" in options.stages and not (options.fuxictr_python and (options.criteo or options.ml1m_half)):
        parser.error("stage fuxictr needs --fuxictr-python, and --criteo or --ml1m-half")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        found = measure(options)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.plot:
        draw_figure(found, options.plot)
    print(json.dumps({**found, "hardware": hardware(), "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
