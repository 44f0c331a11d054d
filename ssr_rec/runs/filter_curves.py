"""Draws what the filters of an over-arch let through while it trained: the paper's Figure 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ssr_rec.runs.curves import COLORS, DPI, lay_grid, legend_below


def filter_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of metrics.jsonl that tell of filters."""
    return [row for row in rows if row.get("filters")]


def draw_filter_curves(rows: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> None:
    """Draw each layer's share of exact zeros and mean absolute value after its filter, against steps, as a PNG.

    Args:
        rows: what ``filter_rows`` returned, not empty.
    """
    figure = Figure(figsize=(11, 4.3), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    steps = [row["step"] for row in rows]
    panels = figure.subplots(1, 2)
    for ax, name, words, scale in zip(
        panels, ("sparsity", "magnitude"), ("% of exact zeros", "mean absolute value"), (100.0, 1.0), strict=True
    ):
        for layer in range(len(rows[0]["filters"])):
            values = [scale * row["filters"][layer][name] for row in rows]
            marker = "o" if len(steps) == 1 else None
            color = COLORS[layer % len(COLORS)]
            ax.plot(steps, values, color=color, linewidth=1.5, marker=marker, label=f"layer {layer + 1}")
        ax.set_title(f"{words}, after the filter", fontsize=11, loc="left", fontweight="bold")
        ax.set_xlabel("training steps")
        ax.set_ylabel(words)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        lay_grid(ax)
        legend_below(ax, ax.get_lines())
    panels[0].set_ylim(0, 100)
    sizes = [layer["magnitude"] for row in rows for layer in row["filters"]]
    if 0 < 10 * min(sizes) < max(sizes):
        panels[1].set_yscale("log")  # layers of different size, each with a shape to see
    else:
        panels[1].set_ylim(bottom=0)
    figure.savefig(path)
