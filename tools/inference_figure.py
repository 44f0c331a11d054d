"""Draws the picture of tools/bench_inference.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from ssr_rec.runs.curves import COLORS, DPI, MARKERS, Decimals, lay_grid

Record = Mapping[str, Any]


def draw(records: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Latency against answers a second (open loop; without one, the closed loop's), and AUC against latency, as a PNG.

    Of the largest batch, the fewest clients and threads; AUC is of the first task, with no panel where none is known.
    """
    loops = records["open"] or records["closed"]
    batch, clients, threads = (min(loop[key] for loop in loops) for key in ("batch", "clients", "threads"))
    batch = max(loop["batch"] for loop in loops)
    setting = {"batch": batch, "clients": clients, "threads": threads}
    names = list(dict.fromkeys(_name(case) for case in records["cases"]))
    styles = {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}
        for i, name in enumerate(names)
    }
    figure = Figure(figsize=(13, 5.2 + 0.07 * len(names)), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"batch {batch}, {threads} thread{'s' * (threads > 1)}, {clients} client{'s' * (clients > 1)}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    scored = any(case["quality"] for case in records["cases"])
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    left = panels[0]
    _draw_load(left, [loop for loop in loops if setting.items() <= loop.items()], styles, bool(records["open"]))
    if scored:
        closed = {_name(loop): loop for loop in records["closed"] if setting.items() <= loop.items()}
        _draw_quality(panels[1], records["cases"], closed, styles)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.savefig(path)


def _draw_load(ax: Axes, loops: Sequence[Record], styles: Mapping[str, Any], is_open: bool) -> None:
    for name, style in styles.items():
        own = sorted((loop for loop in loops if _name(loop) == name), key=lambda loop: loop["per_second"])
        for quantile, line in (("p50", "-"), ("p99", ":")):
            points = [(loop["per_second"], loop["latency"][quantile]) for loop in own]
            points = [(x, y * 1e3) for x, y in points if y is not None]
            if points:
                label = name if quantile == "p50" else None
                ax.plot(*zip(*points, strict=True), linestyle=line, markersize=5, label=label, **style)
    ax.set_title(f"{'open' if is_open else 'closed'} loop: p50 (line) and p99 (dotted)", loc="left", fontsize=10)
    ax.set_xlabel("answers a second")
    ax.set_ylabel("latency, ms" + (", from the scheduled arrival" if is_open else ""))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else ""))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    _dress(ax)


def _draw_quality(ax: Axes, cases: Sequence[Record], closed: Mapping[str, Record], styles: Mapping[str, Any]) -> None:
    ax.set_title("AUC against latency", loc="left", fontsize=10)
    ax.set_xlabel("p50 of the closed loop, ms, with p10-p90 of the turns")
    _dress(ax)
    known = [case for case in cases if case["quality"] and _name(case) in closed]
    task = next(iter(known[0]["quality"]))
    for case in known:
        loop = closed[_name(case)]
        middle, spread = loop["median"], loop["spread"] or {"p10": loop["median"], "p90": loop["median"]}
        ends = [[(middle - spread["p10"]) * 1e3], [(spread["p90"] - middle) * 1e3]]
        style = styles[_name(case)]
        ax.errorbar([middle * 1e3], [case["quality"][task]["auc"]], xerr=ends, capsize=3, markersize=7, **style)
    ax.set_ylabel(f"test AUC, {task}")
    ax.set_xlim(left=0)
    ax.margins(y=0.2)
    ax.yaxis.set_major_formatter(Decimals())


def _dress(ax: Axes) -> None:
    lay_grid(ax)


def _name(record: Record) -> str:
    return f"{record['model']}, {record['label']}"
