"""Draws the picture of tools/bench_over_arch.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ssr_rec.runs.curves import COLORS, DPI


def draw(parts: Mapping[str, Sequence[Mapping[str, Any]]], subtitle: str, path: Path) -> None:
    """Bars: over-archs by GFLOP/s, operators by time, with p10-p90; the bytes moved over the least; saved memory."""
    parts = {part: records for part, records in parts.items() if records}
    heights = [1.2 + 0.36 * len(records) for records in parts.values()]
    figure = Figure(figsize=(14, sum(heights) + 0.5), dpi=DPI, layout="constrained")
    figure.suptitle(subtitle, fontsize=10, x=0.01, ha="left")
    grid = figure.subplots(len(parts), 3, squeeze=False, height_ratios=heights, sharey="row")
    for row, (part, records) in zip(grid, parts.items(), strict=True):
        several = len({record["batch"] for record in records}) > 1
        names = [f"{r['name']}, batch {r['batch']}" if several else r["name"] for r in records]
        speed = part == "over_archs"
        # The slowest tenth of the times is the lowest tenth of the speeds.
        quantiles = ("p90", "median", "p10") if speed else ("p10", "median", "p90")
        low, middle, high = ([_bar(record, q, speed) for record in records] for q in quantiles)
        spread = [np.subtract(middle, low), np.subtract(high, middle)]
        moved = [math.nan if r["bytes_moved"] is None else r["bytes_moved"] / r["least_bytes"] for r in records]
        saved = [r["saved_bytes"] / 1e6 for r in records]
        panels = [
            ("GFLOP/s, with p10-p90" if speed else "ms, with p10-p90", middle, spread),
            ("bytes moved over the least", moved, None),
            ("MB saved for the backward", saved, None),
        ]
        for ax, color, (title, lengths, error) in zip(row, COLORS, panels, strict=False):
            places = range(len(names))
            if error is None or speed:
                ax.barh(places, lengths, xerr=error, color=color, ecolor="#333333", capsize=3)
            else:
                # Times differ by orders of magnitude, and a bar on a logarithmic scale starts nowhere.
                ax.errorbar(lengths, places, xerr=error, fmt="o", color=color, ecolor="#333333", capsize=3)
                ax.set_xscale("log")
                ax.grid(axis="x", color="#dddddd", linewidth=0.7)
            # Behind the whisker, where there is one.
            ends = lengths if error is None else high
            for place, length, end in zip(places, lengths, ends, strict=True):
                text, at = ("-", 0.0) if math.isnan(length) else (f"{length:.3g}", end)
                ax.annotate(text, (at, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
            ax.set_yticks(places, names, fontsize=9)
            ax.set_title(title, fontsize=10, loc="left")
            ax.margins(x=0.15)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    figure.savefig(path)


def _bar(record: Mapping[str, Any], quantile: str, speed: bool) -> float:
    seconds = record["seconds"][quantile]
    return record["flops"] / seconds / 1e9 if speed else seconds * 1e3
