"""Measures speed, memory and bytes of over-archs, and of SSR's operators, side by side in one run.

    python tools/bench_over_arch.py --over-archs "ssr:filter=static,num_views=8,view_dim=128" "mlp:hidden=[320,320,320]"
    python tools/bench_over_arch.py --over-archs mlp ssr "ssr:filter=dynamic" --equal flops 1.2e6
    python tools/bench_over_arch.py --operators --views 8 --view-dim 128

An over-arch is its name, then its config's keys, as in ``over_arch`` of a run's config. The steps take turns; times are
medians, ratios those of medians, against the first over-arch of the same batch size. tools/over_arch_cases.py says what
the other figures count. The last line is JSON, in seconds, bytes and FLOPs.
"""

from __future__ import annotations

from ssr_rec.common.errors import UserError
from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from over_arch_cases import Case, Setting, build, interleave, operator_cases, over_arch_case
from over_arch_figure import draw
from over_arch_sizes import COSTS, SIZE_KEYS, parse_over_arch, resize
from step_bytes import bytes_moved, peak_bytes, saved_bytes

from ssr_rec.common.formatting import short_number
from ssr_rec.common.logs import quiet
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.runs.provenance import git_commit, hardware, versions
from ssr_rec.runs.table import markdown_table

EQUAL_HELP = f"{' or '.join(COSTS)}, and its value for each over-arch (FLOPs of one sample's forward): scales one size"
CACHE_HELP = "what a timed step finds: cold, what another left; warm, what an untimed one of its own left just before"
OVER_ARCH_OPTIONS = {"equal": None, "fields": 39, "dim": 16, "mode": "train"}
OPERATOR_OPTIONS = {"views": 8, "view_dim": 128, "iterations": 5}
"""Options of one part alone, with their defaults: without that part they would have no effect."""
Record = dict[str, Any]


def measure(cases: Sequence[Case], options: argparse.Namespace, setting: Setting) -> list[Record]:
    """Times and other figures of each case, in their order."""
    seconds = interleave(cases, options.repetitions, options.warmup, setting.device, options.cache == "warm")
    records = []
    for case, taken in zip(cases, seconds, strict=True):
        p10, median, p90 = (float(value) for value in np.percentile(taken, [10, 50, 90]))
        records.append(
            {
                "name": case.name,
                "seconds": {"median": median, "p10": p10, "p90": p90},
                "flops": case.flops,
                "flops_per_s": case.flops / median,
                "least_bytes": case.least_bytes,
                "least_bytes_per_s": case.least_bytes / median,
                "bytes_moved": None if case.fused else bytes_moved(case.step),
                "saved_bytes": saved_bytes(case.step, case.resident),
                "peak_bytes": peak_bytes(case.step, setting.device) if setting.device.type == "cuda" else None,
            }
        )
    return records


def over_arch_records(
    configs: Sequence[tuple[str, OverArchConfig]], options: argparse.Namespace, setting: Setting
) -> list[Record]:
    """Time every over-arch, batch by batch; ``ratio`` is to the first of the batch."""
    records = []
    labels = [config.label for _, config in configs]
    for batch in options.batch:
        torch.compiler.reset()
        cases = [
            over_arch_case(config, options.fields, options.dim, batch, options.mode == "train", setting)
            for _, config in configs
        ]
        measured = measure(cases, options, setting)
        for (spec, config), record in zip(configs, measured, strict=True):
            over_arch = build(config, options.fields, options.dim)
            flops = over_arch.flops()
            record |= {
                "name": config.label if labels.count(config.label) == 1 else spec,
                "spec": spec,
                "config": config.model_dump(mode="json"),
                "batch": batch,
                "parameters": over_arch.num_parameters,
                "flops_per_sample": {"matmul": flops.matmul, "elementwise": flops.elementwise},
                "samples_per_s": batch / record["seconds"]["median"],
                "ratio": {
                    "seconds": record["seconds"]["median"] / measured[0]["seconds"]["median"],
                    "flops_per_s": record["flops_per_s"] / measured[0]["flops_per_s"],
                },
            }
        records += measured
    return records


def operator_records(options: argparse.Namespace, setting: Setting) -> list[Record]:
    """Time every operator, batch by batch; ``ratio`` of its time is to those that it is measured against."""
    records = []
    for batch in options.batch:
        torch.compiler.reset()
        measured = measure(
            operator_cases(batch, options.views, options.view_dim, options.iterations, setting), options, setting
        )
        times = {record["name"]: record["seconds"]["median"] for record in measured}
        for record in measured:
            name = record["name"]
            against = [other for other in times if other.startswith((f"{name},", f"{name}:"))]
            against += ["relu fwd", "copy"] if name.startswith("ICS") else []
            record |= {"batch": batch, "ratio": {other: times[name] / times[other] for other in against}}
        records += measured
    return records


def table(records: Sequence[Record]) -> str:
    """Return what the terminal shows of over-archs, or of operators."""
    over_archs = "parameters" in records[0]
    header = ["over-arch" if over_archs else "operator", "batch", "ms", "p10-p90", "GFLOP/s", "least MB", "GB/s of it"]
    header += ["moved", "saved MB", "peak MB"]
    header += ["params", "FLOPs/sample", "time", "FLOP/s"] if over_archs else ["time against"]
    lines = []
    for record in records:
        seconds, moved, peak = record["seconds"], record["bytes_moved"], record["peak_bytes"]
        line = [
            record["name"],
            str(record["batch"]),
            f"{seconds['median'] * 1e3:.3f}",
            f"{seconds['p10'] * 1e3:.3f}-{seconds['p90'] * 1e3:.3f}",
            f"{record['flops_per_s'] / 1e9:.1f}" if record["flops"] else "-",
            f"{record['least_bytes'] / 1e6:.2f}",
            f"{record['least_bytes_per_s'] / 1e9:.1f}",
            "-" if moved is None else f"{moved / record['least_bytes']:.2f}x",
            f"{record['saved_bytes'] / 1e6:.2f}",
            "-" if peak is None else f"{peak / 1e6:.2f}",
        ]
        if over_archs:
            line += [short_number(record["parameters"]), short_number(sum(record["flops_per_sample"].values()))]
            line += [f"{record['ratio'][key]:.2f}x" for key in ("seconds", "flops_per_s")]
        else:
            short = {other.removeprefix(record["name"]).strip(",: "): r for other, r in record["ratio"].items()}
            line.append(", ".join(f"{ratio:.2f}x {other}" for other, ratio in short.items()) or "-")
        lines.append(line)
    return markdown_table(header, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = parser.add_argument_group("both parts")
    both.add_argument("--batch", type=int, nargs="+", default=[1024], help="rows; several are measured one by one")
    both.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: by autocast")
    both.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    both.add_argument("--compile", action="store_true", help="torch.compile every over-arch, layer and ICS")
    both.add_argument("--threads", type=int, default=1, help="torch threads")
    both.add_argument("--repetitions", type=int, default=30, help="timed turns")
    both.add_argument("--warmup", type=int, default=5, help="turns before them, not timed")
    both.add_argument("--cache", choices=["cold", "warm"], default="cold", help=CACHE_HELP)
    both.add_argument("--plot", type=Path, help="a PNG of the figures")
    part = parser.add_argument_group("over-archs")
    part.add_argument("--over-archs", nargs="+", default=[], metavar="SPEC", help="name:key=value,...; the first is 1x")
    part.add_argument("--equal", nargs=2, metavar=("COST", "VALUE"), help=EQUAL_HELP)
    part.add_argument("--fields", type=int, help="fields of the input (default 39)")
    part.add_argument("--dim", type=int, help="dims of a field (default 16)")
    part.add_argument("--mode", choices=["forward", "train"], help="train, the default: forward and backward")
    part = parser.add_argument_group("operators, each forward, and forward and backward")
    part.add_argument("--operators", action="store_true", help="ICS, ReLU, copy, SSR layers, plain forms, GEMMs")
    part.add_argument("--views", type=int, help="views (default 8)")
    part.add_argument("--view-dim", type=int, help="dims of a view (default 128)")
    part.add_argument("--iterations", type=int, help="T of ICS (default 5)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what has no effect or no meaning, and fill in defaults.

    Raises:
        ValueError: names the option.
    """
    if not options.over_archs and not options.operators:
        raise UserError("nothing to measure: give --over-archs or --operators")
    parts = (
        ("--over-archs", options.over_archs, OVER_ARCH_OPTIONS),
        ("--operators", options.operators, OPERATOR_OPTIONS),
    )
    for part, wanted, defaults in parts:
        for key, default in defaults.items():
            if getattr(options, key) is None:
                setattr(options, key, default)
            elif not wanted:
                raise UserError(f"--{key.replace('_', '-')} has no effect without {part}: remove it, or give {part}")
    for key in ("fields", "dim", "views", "view_dim", "iterations", "threads", "repetitions", "warmup", "batch"):
        if np.min(getattr(options, key)) < 1:
            raise UserError(f"--{key.replace('_', '-')} {getattr(options, key)}: must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    if options.plot is not None and not options.plot.parent.is_dir():
        raise UserError(f"--plot {options.plot}: there is no folder {options.plot.parent}; make it first")
    if options.equal is not None and options.equal[0] not in COSTS:
        raise UserError(f"--equal {options.equal[0]}: must be {' or '.join(COSTS)}")


def _configs(options: argparse.Namespace) -> list[tuple[str, OverArchConfig]]:
    configs = [(spec, parse_over_arch(spec)) for spec in options.over_archs]
    if options.equal is None:
        for _, config in configs:
            build(config, options.fields, options.dim)
        return configs
    cost, text = options.equal
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not 0 < target < math.inf:
        raise UserError(f"--equal {cost} {text}: the value must be a positive number, such as 1.2e6")
    configs = [(spec, resize(config, cost, target, options.fields, options.dim)) for spec, config in configs]
    for _, config in configs:
        value = getattr(build(config, options.fields, options.dim), COSTS[cost])
        size = SIZE_KEYS[config.name]
        print(f"{config.label}: {size}={getattr(config, size)} has {value:,} {cost}, {value / target - 1:+.1%}")
    return configs


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        _check(options)
        configs = _configs(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    setting = Setting(torch.device(options.device), options.dtype == "bf16", options.compile)
    parts = {
        "over_archs": over_arch_records(configs, options, setting) if configs else [],
        "operators": operator_records(options, setting) if options.operators else [],
    }
    for records in filter(None, parts.values()):
        print(table(records), end="\n\n")
    settings = {key: value for key, value in vars(options).items() if key != "plot"}
    if options.plot is not None:
        how = f"{options.dtype}, {options.device}, threads {options.threads}{', compiled' if options.compile else ''}"
        shape = f", input {options.fields * options.dim}, {options.mode}" if configs else ""
        draw(parts, f"{how}{shape}, batch {', '.join(map(str, options.batch))}", options.plot)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Of the process, hence of all steps together: the system keeps one high-water mark.
    own = {"settings": settings, "peak_rss_bytes": rss, "commit": git_commit()}
    print(json.dumps({**parts, **own, "hardware": hardware(), "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
