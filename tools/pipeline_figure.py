"""Draws the picture of tools/bench_pipeline.py: rows/s and peak memory of each stage over the rows of the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ssr_rec.runs.curves import COLORS

SHOWN = ("draw", "prepare", "read")


def draw_figure(found: dict[str, Any], path: Path) -> None:
    """Write a PNG of the stages that were measured; from figures of one run, or of several put together."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for color, name in zip(COLORS, SHOWN, strict=False):
        points = sorted((entry["rows"], entry["rows_per_cpu_s"], entry["peak_mb"]) for entry in found.get(name, []))
        if points:
            rows, speeds, peaks = zip(*points, strict=True)
            speed.plot(rows, speeds, marker="o", color=color, label=name)
            memory.plot(rows, [peak / 1_000 for peak in peaks], marker="o", color=color, label=name)
    for axes, title in ((speed, "rows per CPU second"), (memory, "peak memory of the process, GB")):
        axes.set_xscale("log")
        axes.set_xlabel("rows of the log")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    memory.set_ylim(0, 4.2)
    memory.axhline(4, color="0.5", linewidth=1, linestyle="--")
    memory.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
