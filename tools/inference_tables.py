"""Writes what bench_inference.py shows on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssr_rec.common.formatting import short_number
from ssr_rec.runs.table import markdown_table

Record = Mapping[str, Any]


def tables(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return the cases, their closed loop, and their open loop where there was one."""
    found = [case_table(records["cases"]), loop_table(records["closed"])]
    return found + ([loop_table(records["open"])] if records["open"] else [])


def case_table(cases: Sequence[Record]) -> str:
    tasks = next((list(case["quality"]) for case in cases if case["quality"]), [])
    header = ["model", "form", "params", "FLOPs/sample", "load s", "peak MB", "of it model MB", "artifact MB"]
    for task in tasks:
        header += [f"{task} AUC", "lost", "logloss", "more"]
    lines = []
    for case in cases:
        line = [case["model"], case["label"], _short(case["parameters"]), _short(case["flops_per_sample"])]
        line += [f"{case['load_s']:.2f}", _mega(case["peak_bytes"])]
        line += [_mega(case["peak_bytes"] - case["before_bytes"]), _mega(case["artifact_bytes"])]
        for task in tasks:
            quality = (case["quality"] or {}).get(task)
            if quality is None:
                line += ["-"] * 4
                continue
            for value, change in (("auc", "auc_loss"), ("logloss", "logloss_rise")):
                line += [f"{quality[value]:.5f}", "-" if quality[change] is None else f"{quality[change]:.1e}"]
        lines.append(line)
    return markdown_table(header, lines)


def loop_table(loops: Sequence[Record]) -> str:
    """Latencies in ms; of an open loop also the share of capacity and what was asked for."""
    is_open = "load" in loops[0]
    varied = [key for key in ("threads", "clients") if len({loop[key] for loop in loops}) > 1]
    header = ["model", "form", *varied, "batch", *(["load", "asked/s"] if is_open else []), "answers/s", "samples/s"]
    header += ["p50 ms", "p90", "p99", "p99.9", "turns", "service p50", "requests", *([] if is_open else ["time"])]
    lines = []
    for loop in loops:
        line = [loop["model"], loop["label"], *(str(loop[key]) for key in varied), str(loop["batch"])]
        line += [f"{loop['load']:g}", f"{loop['asked_per_s']:.1f}"] if is_open else []
        line += [f"{loop['per_second']:.1f}", short_number(loop["per_second"] * loop["batch"])]
        line += ["n/a" if value is None else _ms(value) for value in loop["latency"].values()]
        spread = loop["spread"]
        line.append(f"{_ms(spread['p10'])}-{_ms(spread['p90'])}" if spread else "-")
        line += [_ms(loop["service"]["p50"]), str(loop["requests"])]
        line += [] if is_open else [f"{loop['ratio']:.2f}x"]
        lines.append(line)
    return markdown_table(header, lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _mega(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


def _short(value: float | None) -> str:
    return "-" if value is None else short_number(value)
