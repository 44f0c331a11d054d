"""Hold the planner's times against the world: published runs on A100 and H100, or jobs on this machine's CPU.

    python tools/check_planner.py                      # a table of published against predicted, in seconds
    python tools/check_planner.py --splits             # also all ways to calibrate on five of the runs
    python tools/check_planner.py --cpu --json OUT     # ten jobs on one and on two ranks of this CPU, minutes

"Held out": the constants are fitted to the other runs alone (ssr_rec/planning/published.py). Prints a Markdown table;
the last line is JSON. Exit code 1 when a held-out run is off by more than the range that the planner's reports give, or
a CPU job by more than 1.5 times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssr_rec.common.logs import quiet
from ssr_rec.common.whole_files import write_text
from ssr_rec.planning.hardware import Assumptions
from ssr_rec.planning.published import PlannedRun, fit, fitted, held_out, plan_runs, read_runs

CPU_WITHIN = 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", action="store_true", help="calibrate on every five of the runs, test on the others")
    parser.add_argument("--cpu", action="store_true", help="planned against measured steps on this machine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="--cpu: numbers of ranks (default 1 2)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="--cpu: see check_planner_cpu.py")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    chosen = parser.parse_args(arguments)
    quiet()
    found = check_cpu(chosen.ranks, chosen.clock) if chosen.cpu else check_published(chosen.splits)
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0 if found["holds"] else 1


def check_cpu(worlds: Sequence[int], clock: str) -> dict[str, Any]:
    """Train small jobs on so many ranks, one world after the other, and return planned against measured."""
    found: dict[str, Any] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for ranks in worlds:
        worker = Path(__file__).with_name("check_planner_cpu.py")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command = [*torchrun, str(worker), "--clock", clock]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with exit code {done.returncode}; its output is above")
        table, _, last = done.stdout.rstrip().rpartition("\n")
        print(f"{ranks} rank{'s' if ranks > 1 else ''}\n{table}\n", flush=True)
        found[str(ranks)] = json.loads(last)
    return {"worlds": found, "holds": all(one["worst_ratio"] <= CPU_WITHIN for one in found.values())}


def check_published(splits: bool) -> dict[str, Any]:
    """Print published against predicted speeds, and return them."""
    published = read_runs()
    runs = plan_runs(published)
    rows = compare(runs)
    print(markdown(rows))
    constants = fitted(fit([run for run in runs if run.run.calibrates]))
    found: dict[str, Any] = {"runs": rows, "constants": constants, "sources": published.sources}
    if splits:
        found["splits"] = check_splits(runs)
        print("Calibrated on any five: ratios of the others, larger over smaller: " + json.dumps(found["splits"]))
    return {**found, "holds": all(row["holds"] for row in rows)}


def compare(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Return a row of figures for each run: what was published, predicted, and predicted with the run held out."""
    rows, own = [], Assumptions()
    for run, held in zip(runs, held_out(runs), strict=True):
        speed, predicted, step = run.run.samples_per_s, run.samples_per_s(own), run.planned.estimate.step
        milliseconds = {
            "published": run.planned.case.config.train.batch_size / speed * 1000,
            "device": step.device,
            "host": run.host_ms(own),
        }
        rows.append(
            {
                "run": run.run.name,
                "source": run.run.source,
                "published": speed,
                "predicted": round(predicted),
                "ratio": round(predicted / speed, 3),
                "held_out_ratio": round(held, 3),
                "step_ms": {name: round(value, 2) for name, value in milliseconds.items()},
                "holds": max(held, 1 / held) <= run.planned.estimate.within,
            }
        )
    return rows


def check_splits(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Return how far off the runs are to which the constants were not fitted, over all ways to fit them to five."""
    some = [run for run in runs if run.run.calibrates]
    off = []
    for five in itertools.combinations(some, 5):
        assumed = fit(five)
        ratios = [run.samples_per_s(assumed) / run.run.samples_per_s for run in some if run not in five]
        off += [max(ratio, 1 / ratio) for ratio in ratios]
    off.sort()
    worst = {"median": statistics.median(off), "9 of 10": off[int(0.9 * len(off))], "worst": off[-1]}
    return {name: round(value, 2) for name, value in worst.items()}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    head = "GPUs x rows, interaction, optimizer, products | source | published samples/s | predicted | ratio | held out"
    lines = [f"| {head} |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        speeds = f"{row['published']:,.0f} | {row['predicted']:,.0f}"
        lines.append(
            f"| {row['run']} | {row['source']} | {speeds} | {row['ratio']:.2f} | {row['held_out_ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
