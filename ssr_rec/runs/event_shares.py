"""Draws what the encoders of sequences look at: the shares of recent and of old events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ssr_rec.common.formatting import decimal
from ssr_rec.runs.curves import COLORS, DPI, lay_grid
from ssr_rec.runs.report import Report

FEW = 100
"""Events below which a mean is drawn pale."""


def shares_of(report: Report) -> dict[str, dict[str, Any]]:
    """Return sequence -> its part of the report, where its encoder has weights and saw an event."""
    return {name: part for name, part in report.sequences.items() if any(part.get("events", ()))}


def draw_event_shares(report: Report, path: str | Path) -> None:
    """Draw, for each sequence, the mean share of an event by position and, where it has ages, by age as a PNG.

    Args:
        report: of a run with at least one sequence in ``shares_of``.
        path: the PNG.
    """
    parts = shares_of(report)
    columns = 1 + any("ages" in part for part in parts.values())
    figure = Figure(figsize=(5.5 * columns, 3.9 * len(parts)), dpi=DPI, layout="constrained")
    figure.suptitle("What counts of a history: test rows, kept weights", fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(len(parts), columns, squeeze=False)
    for (name, part), (position, *others) in zip(parts.items(), panels, strict=True):
        places = np.arange(1, len(part["shares"]) + 1)
        _draw(position, places, part["shares"], part["events"])
        title = f"{name}: {part['kind']}, spread {decimal(part['spread'], 2)}"
        position.set_title(title, fontsize=11, loc="left", fontweight="bold")
        position.set_xlabel("events from the end of the history (1: the most recent)")
        position.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for age in others:
            if "ages" not in part:
                age.set_axis_off()
                continue
            _draw(age, np.array(part["ages"]) + 1, part["age_shares"], part["age_events"])
            age.set_title(f"{name}: by age", fontsize=11, loc="left", fontweight="bold")
            age.set_xlabel("age of the event + 1 (unit of the log; seconds of moments)")
            age.set_xscale("log")
            age.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path)


def _draw(ax: Axes, x: np.ndarray, shares: list[float | None], events: list[int]) -> None:
    """Draw shares as points, pale where few events stand behind one, over the average event's 1."""
    y, number = np.array(shares, dtype=float), np.array(events)
    ax.axhline(1, color="#444444", linestyle=":", linewidth=1.2)
    ax.plot(x, y, color=COLORS[0], linewidth=1.2, alpha=0.5)
    for some, alpha in ((number < FEW, 0.25), (number >= FEW, 1.0)):
        ax.scatter(x[some], y[some], s=22, color=COLORS[0], alpha=alpha, zorder=3)
    ax.set_ylim(0, max(2.0, 1.1 * np.nanmax(y)))  # never a scale on which nothing looks like something
    ax.set_ylabel("share (1: the row's average event)")
    lay_grid(ax)
