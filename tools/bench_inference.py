"""Measures latency, throughput, memory and quality of served models, side by side in one run.

    python tools/bench_inference.py --run runs/ssr_s --tables fp32 int8 --picture latency.png
    python tools/bench_inference.py --artifact artifacts/ssr_s --batch 1 256 --clients 1 2 --load .3 .6 .8 .9
    python tools/bench_inference.py --config configs/kuairand_ssr_s.yaml --over-archs mlp "ssr:filter=static" rankmixer
        --match params=1e6

A run is measured in the modes eager, compiled and aot, an artifact as it is; a config has untrained weights and random
ids: latency only. tools/inference_cases.py says what the modes are. Each case has a process of its own, and they take
turns, in another order every time. Closed loop: every client sends its next request when it has its answer. Open loop
(--load): Poisson arrivals at a share of what the closed loop reached, latency counted from the time a request was due.
A percentile with fewer than ten requests beyond it is n/a; "turns" is p10-p90 of the turns' medians. The last line is
JSON, in seconds and bytes.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from inference_cases import MODES, Case
from inference_figure import draw
from inference_sources import DENSE, TABLES, Source, cases_of, match_of, read_sources
from inference_tables import tables
from inference_worker import CLOCKS, Failed, Worker

from ssr_rec.common.logs import quiet
from ssr_rec.metrics.exact import auc, logloss
from ssr_rec.runs.provenance import git_commit, hardware, versions
from ssr_rec.serving.latency import Requests, poisson_arrivals, summary

Record = dict[str, Any]
Key = tuple[int, int, int]
"""Case, batch, clients."""
FEWEST = 5
"""Requests of a turn, however slow."""


def closed_turns(workers: Sequence[Worker], options: argparse.Namespace) -> dict[Key, list[Requests]]:
    """Run every case, batch and number of clients, ``repetitions`` times, in another order each time."""
    keys = list(product(range(len(workers)), options.batch, options.clients))
    counts = {}
    for case, batch, clients in keys:
        # Twice, because the first request of a size may compile or allocate.
        pilot = [
            workers[case].ask("drive", batch, clients, FEWEST * clients, options.warmup, options.clock)
            for _ in range(2)
        ][1]
        counts[case, batch, clients] = max(FEWEST * clients, int(options.seconds * pilot.per_second))
    turns: dict[Key, list[Requests]] = {key: [] for key in keys}
    order = np.random.default_rng(options.seed)
    for _ in range(options.repetitions):
        for index in order.permutation(len(keys)):
            case, batch, clients = key = keys[index]
            turns[key].append(workers[case].ask("drive", batch, clients, counts[key], options.warmup, options.clock))
    return turns


def open_turns(
    workers: Sequence[Worker], rates: dict[Key, float], options: argparse.Namespace
) -> dict[tuple[Key, float], list[Requests]]:
    """Run the same with Poisson arrivals at each share of ``rates``, answers a second.

    The arrivals of a repetition and a share are the same for all cases but for the rate, so that no case has the
    luckier ones.
    """
    keys = list(product(rates, options.load))
    turns: dict[tuple[Key, float], list[Requests]] = {key: [] for key in keys}
    order = np.random.default_rng(options.seed)
    for repetition in range(options.repetitions):
        for index in order.permutation(len(keys)):
            (case, batch, clients), share = key = keys[index]
            rate = share * rates[key[0]]
            count = max(FEWEST, round(rate * options.open_seconds))
            arrivals = poisson_arrivals(rate, count, [options.seed, repetition, round(share * 1_000)])
            turns[key].append(workers[case].ask("drive", batch, clients, arrivals, options.warmup, options.clock))
    return turns


def measure(workers: Sequence[Worker], options: argparse.Namespace) -> dict[str, list[Record]]:
    """Return ``cases``, ``closed`` and ``open`` as in the JSON; ``ratio`` is to the first case of the same load."""
    closed = closed_turns(workers, options)
    records: dict[str, list[Record]] = {"cases": [], "closed": [], "open": []}
    rates = {}
    for (case, batch, clients), turns in closed.items():
        found = summary(turns)
        first = summary(closed[0, batch, clients])
        rates[case, batch, clients] = float(found["per_second"])
        records["closed"].append(
            _names(workers[case].case, batch, clients)
            | found
            | {"samples_per_s": found["per_second"] * batch, "ratio": found["median"] / first["median"]}
        )
    for ((case, batch, clients), share), turns in open_turns(workers, rates, options).items():
        records["open"].append(
            _names(workers[case].case, batch, clients)
            | summary(turns)
            | {"load": share, "asked_per_s": share * rates[case, batch, clients]}
        )
    for worker in workers:
        used = worker.ask("memory")
        records["cases"].append(
            {"model": worker.case.model, "label": worker.case.label, "mode": worker.case.mode}
            | {"threads": worker.case.threads, **worker.case.fixed, "load_s": worker.loaded["load_s"]}
            | {"peak_bytes": used["peak"], "before_bytes": worker.loaded["before_bytes"]}
        )
    for worker, record in zip(workers, records["cases"], strict=True):
        record["quality"] = quality(worker) if worker.case.data is not None and not options.no_quality else None
    _losses(records["cases"])
    return records


def quality(worker: Worker) -> Record:
    """Return AUC and logloss of each task on the whole test fold."""
    logits, labels = worker.ask("fold")
    tasks = worker.case.schema.labels
    return {
        task: {"auc": auc(logits[:, i], labels[:, i]), "logloss": logloss(logits[:, i], labels[:, i])}
        for i, task in enumerate(tasks)
    }


def _losses(cases: Sequence[Record]) -> None:
    """Adds what a case's AUC is below that of its model in fp32, eager if that was measured, and logloss above."""
    for record in cases:
        exact = [
            other["quality"]
            for other in cases
            if other["model"] == record["model"] and other["quality"] and other["tables"] == other["dense"] == "fp32"
        ]
        for task, found in (record["quality"] or {}).items():
            known = bool(exact)
            found["auc_loss"] = exact[0][task]["auc"] - found["auc"] if known else None
            found["logloss_rise"] = found["logloss"] - exact[0][task]["logloss"] if known else None


def _names(case: Case, batch: int, clients: int) -> Record:
    names = {"model": case.model, "label": case.label, "threads": case.threads}
    return names | {"batch": batch, "clients": clients}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_argument_group("what is measured, in this order; the first case is 1x")
    part.add_argument("--run", type=Path, nargs="+", default=[], help="run folders")
    part.add_argument("--artifact", type=Path, nargs="+", default=[], help="artifacts of tools/export.py")
    part.add_argument("--config", type=Path, nargs="+", default=[], help="YAML files of runs: untrained weights")
    part.add_argument("--data", type=Path, help="prepared log to take rows from; default: a run's own, else random ids")
    part.add_argument("--over-archs", nargs="+", default=[], metavar="SPEC", help="with --config, in place of its own")
    part.add_argument(
        "--match", help="params=N or flops=N: scale one size of each over-arch to it, flops of one sample"
    )
    part.add_argument("--multiple", type=int, help="of this the sizes found by --match are (default 8)")
    part.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of runs and configs")
    part.add_argument("--tables", nargs="+", choices=TABLES, default=["fp32"], help="of aot")
    part.add_argument("--dense", nargs="+", choices=DENSE, default=["fp32"], help="of aot")
    part.add_argument(
        "--keep", type=Path, help="folder for the artifacts of aot, used again if there; default: deleted at the end"
    )
    part.add_argument(
        "--raw", action="store_true", help="artifacts also with raw rows, as mappings and as Arrow tables"
    )
    part = parser.add_argument_group("load")
    part.add_argument("--batch", type=int, nargs="+", default=[256], help="rows of a request")
    part.add_argument("--threads", type=int, nargs="+", default=[1], help="torch threads of a case")
    part.add_argument("--clients", type=int, nargs="+", default=[1], help="requests under way at once")
    part.add_argument("--load", type=float, nargs="*", default=[], help="open loop too, at these shares of capacity")
    part.add_argument("--repetitions", type=int, default=10, help="turns of each case and load")
    part.add_argument("--seconds", type=float, default=0.5, help="about so long is a turn of the closed loop")
    part.add_argument("--open-seconds", type=float, default=2.0, help="about so long is a turn of the open loop")
    part.add_argument("--warmup", type=int, default=3, help="requests at the start of a turn that do not count")
    part.add_argument("--seed", type=int, default=0, help="of random ids, places in the fold, arrivals, order of turns")
    part.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: where others use the cores as well")
    parser.add_argument("--no-quality", action="store_true", help="do not score the test fold")
    parser.add_argument("--picture", type=Path, help="a PNG: latency against answers a second, AUC against latency")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what has no effect or no meaning.

    Raises:
        ValueError: names the option.
    """
    if not (options.run or options.artifact or options.config):
        raise UserError("nothing to measure: give --run, --artifact or --config")
    for key in ("over_archs", "match"):
        if getattr(options, key) and not options.config:
            raise UserError(f"--{key.replace('_', '-')} has no effect without --config: remove it, or give a config")
    if options.multiple is not None and options.match is None:
        raise UserError("--multiple has no effect without --match: remove it")
    if options.raw and not (options.artifact or "aot" in options.modes):
        raise UserError("--raw has no effect without an artifact or the mode aot: remove it")
    made = (options.run or options.config) and "aot" in options.modes
    for key, value in (("tables", ["fp32"]), ("dense", ["fp32"]), ("keep", None)):
        if getattr(options, key) != value and not made:
            raise UserError(f"--{key} has no effect without an aot case of a run or config: remove it")
    for key in ("batch", "threads", "clients", "repetitions", "warmup", "multiple"):
        value = getattr(options, key)
        if value is not None and np.min(value) < (0 if key == "warmup" else 1):
            raise UserError(f"--{key} {value}: must be at least {0 if key == 'warmup' else 1}")
    for key in ("seconds", "open_seconds", "load"):
        value = getattr(options, key)
        if np.size(value) and not (np.min(value) > 0 and np.max(value) < np.inf):
            raise UserError(f"--{key.replace('_', '-')} {value}: must be a positive number")
    if options.clock == "cpu" and (options.load or [*options.clients, *options.threads] != [1, 1]):
        raise UserError("--clock cpu is the time of one thread: with it no --load, and one of --clients and --threads")
    if options.picture is not None and not options.picture.parent.is_dir():
        raise UserError(f"--picture {options.picture}: there is no folder {options.picture.parent}; make it first")


def run_benchmark(sources: Sequence[Source], options: argparse.Namespace) -> dict[str, list[Record]]:
    """Builds every case, starts its process, measures, and ends them."""
    with ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = cases_of(sources, options, keep)
        workers = []
        for case in cases:
            print(f"{case.name}: starting", file=sys.stderr)
            worker = Worker(case, options.batch, options.seed)
            stack.callback(worker.close)
            workers.append(worker)
        return measure(workers, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for bad input, 1 for a case whose process failed."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        _check(options)
        sources = read_sources(options, match_of(options.match))
        records = run_benchmark(sources, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for text in tables(records):
        print(text, end="\n\n")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings |= {key: [str(path) for path in getattr(options, key)] for key in ("run", "artifact", "config")}
    if options.picture is not None:
        draw(records, options.picture)
    own = {"settings": settings, "commit": git_commit()}
    print(json.dumps({**records, **own, "hardware": hardware(), "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
