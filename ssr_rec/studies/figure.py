"""Draws a comparison: test AUC, of numbers XAUC, against parameters and against FLOPs, a row of panels per task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from scipy import stats

from ssr_rec.runs.curves import COLORS, DPI, Decimals, lay_grid
from ssr_rec.runs.measures import title as title_of
from ssr_rec.studies.doublings import fit_parabola

COSTS = {"num_parameters": "Params, without embedding tables", "flops_1024": "FLOPs of 1,024 samples"}
BASELINE_COLOR = "#5a6470"
LABEL_SIZE, POINT_RADIUS = 8.5, 7.0
DIRECTIONS = tuple((np.cos(angle), np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False))
DISTANCES = (9.0, 16.0, 26.0, 40.0, 60.0)
"""Of a label from its point, in the points of typography."""
LEADER_FROM = 20.0
"""Distance from which a line ties a label to its point."""


def draw_costs(frame: pd.DataFrame, title: str, path: str | Path) -> None:
    """Draw ``summarise``'s frame as a PNG, 6 inches of width per panel.

    A point is a system's mean, its bar one standard deviation each way. Systems of one ``curve`` are labelled once, and
    joined by the fitted parabola or, where none can be, by lines. Its 95 % band is of its shape, given these seeds:
    other seeds may move all of it. Systems without a finished run are left out.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    figure = Figure(figsize=(13, 5.4 * len(tasks) + 0.7), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    styles = _styles(frame)
    panels = figure.subplots(len(tasks), len(COSTS), squeeze=False, sharey="row")
    drawn = []
    for panel, task in zip(panels, tasks, strict=True):
        rows = frame[frame["task"] == task]
        name = rows["measure"].iloc[0]
        known = rows.assign(mean=rows[f"{name}_mean"], sd=rows[f"{name}_sd"].fillna(0.0)).dropna(subset=["mean"])
        for ax, (cost, words) in zip(panel, COSTS.items(), strict=True):
            _draw_panel(ax, known, cost, styles)
            ax.set_title(f"Test {title_of(name)} of {task}", fontsize=11, loc="left", fontweight="bold")
            ax.set_xlabel(words)
            drawn.append((ax, known, cost))
    _legend(figure, frame)
    # Labels are placed in pixels, which exist once the layout does.
    canvas.draw()
    figure.set_layout_engine("none")
    for ax, known, cost in drawn:
        _place_labels(ax, known, cost, styles)
    figure.savefig(path)


def _styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return colour and marker of each group: baselines that stand alone share one, everything else has its own."""
    ours = cycle(zip(COLORS[:2] + COLORS[4:6], "D*s^", strict=True))
    theirs = cycle(zip(COLORS[2:], "osv^PX", strict=True))
    styles = {}
    for group, rows in _groups(frame):
        if not rows["baseline"].all():
            color, marker = next(ours)
            styles[group] = {"color": color, "marker": marker, "markersize": 12 if marker == "*" else 8, "zorder": 4}
        elif rows["curve"].notna().any():
            color, marker = next(theirs)
            styles[group] = {"color": color, "marker": marker, "markersize": 6, "mfc": "white", "zorder": 3}
        else:
            styles[group] = {"color": BASELINE_COLOR, "marker": "o", "markersize": 6, "mfc": "white", "zorder": 3}
    return styles


def _groups(frame: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """Yield what is drawn as one: a curve's systems, or a system on its own."""
    for name, rows in frame.groupby(frame["curve"].fillna(frame["system"]), sort=False):
        yield str(name), rows


def _draw_panel(ax: Axes, known: pd.DataFrame, cost: str, styles: dict[str, dict[str, Any]]) -> None:
    ax.set_xscale("log")
    lay_grid(ax)
    for group, rows in _groups(known):
        ordered = rows.sort_values(cost)
        line = ("--" if rows["baseline"].all() else "-") if len(rows) > 1 else "none"
        fit = fit_parabola(rows, cost) if rows["curve"].notna().all() else None
        if fit is not None:
            sizes = np.geomspace(ordered[cost].iloc[0], ordered[cost].iloc[-1], 60)
            mean, error = fit.mean(sizes)
            half = stats.t.ppf(0.975, fit.freedom) * error
            color = styles[group]["color"]
            ax.plot(sizes, mean, line, linewidth=1.4, color=color, zorder=2)
            ax.fill_between(sizes, mean - half, mean + half, color=color, alpha=0.13, linewidth=0, zorder=1)
            line = "none"
        ax.errorbar(
            ordered[cost],
            ordered["mean"],
            yerr=ordered["sd"],
            linestyle=line,
            linewidth=1.4,
            elinewidth=1.2,
            capsize=3,
            **styles[group],
        )
    ax.yaxis.set_major_formatter(Decimals())
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.tick_params(labelleft=True)
    if known.empty:
        ax.text(0.5, 0.5, "no values yet", transform=ax.transAxes, ha="center", color="#777777")
        return
    # Room for the labels of the outermost points.
    low, high = np.log10(known[cost].min()), np.log10(known[cost].max())
    margin = 0.14 * (high - low) + 0.05
    ax.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    is_narrow = high - low + 2 * margin < 0.8
    ax.xaxis.set_major_locator(LogLocator(10, subs=range(1, 10) if is_narrow else (1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    bottom = (known["mean"] - known["sd"]).min()
    top = (known["mean"] + known["sd"]).max()
    room = 0.12 * (top - bottom) + 1e-4
    ax.set_ylim(bottom - room, top + room)


def _legend(figure: Figure, frame: pd.DataFrame) -> None:
    bar = Line2D([], [], color="#444444", marker="|", markersize=12, linestyle="none", label="mean ± sd over seeds")
    hollow = Line2D([], [], color=BASELINE_COLOR, marker="o", mfc="white", linestyle="none", label="baseline")
    filled = Line2D([], [], color=COLORS[0], marker="D", linestyle="none", label="not a baseline")
    fitted = Patch(
        color=BASELINE_COLOR,
        alpha=0.25,
        label="parabola in the size's logarithm; 95 % band of its shape, given the seeds",
    )
    has_fit = any(fit_parabola(rows, "num_parameters") for _, rows in frame.groupby(["task", "curve"]))
    wanted = [True, has_fit, frame["baseline"].any(), not frame["baseline"].all()]
    handles = [handle for handle, is_wanted in zip((bar, fitted, hollow, filled), wanted, strict=True) if is_wanted]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=9)


def _place_labels(ax: Axes, known: pd.DataFrame, cost: str, styles: dict[str, dict[str, Any]]) -> None:
    """Write each group's name beside its point, a curve's beside its last, where it covers nothing."""
    pixels = ax.figure.dpi / 72
    taken = _marks(ax, known, cost, pixels)
    for group, rows in sorted(_groups(known), key=lambda item: -item[1][cost].max()):
        last = rows.loc[rows[cost].idxmax()]
        point = ax.transData.transform((last[cost], last["mean"]))
        weight = "normal" if last["baseline"] else "bold"
        text = ax.text(0, 0, group, fontsize=LABEL_SIZE, color=styles[group]["color"], fontweight=weight, zorder=5)
        size = text.get_window_extent()
        box, distance = _best_box(point, size.width, size.height, taken, ax.get_window_extent(), pixels)
        taken.append(box)
        text.set_position(tuple(ax.transData.inverted().transform((box.x0, box.y0))))
        text.set_verticalalignment("bottom")
        if distance >= LEADER_FROM:
            end = ax.transData.inverted().transform(
                (np.clip(point[0], box.x0, box.x1), np.clip(point[1], box.y0, box.y1))
            )
            ax.plot([last[cost], end[0]], [last["mean"], end[1]], color="#999999", linewidth=0.7, zorder=1)


def _marks(ax: Axes, known: pd.DataFrame, cost: str, pixels: float) -> list[Bbox]:
    """Return where points, bars and the lines of curves are, in pixels."""
    radius = POINT_RADIUS * pixels
    marks = []
    for _, rows in _groups(known):
        ordered = rows.sort_values(cost)
        points = [ax.transData.transform(pair) for pair in zip(ordered[cost], ordered["mean"], strict=True)]
        for (x, y), mean, sd in zip(points, ordered["mean"], ordered["sd"], strict=True):
            half = ax.transData.transform((1, mean + sd))[1] - y
            marks.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
            marks.append(Bbox.from_extents(x - radius / 2, y - half, x + radius / 2, y + half))
        for start, end in pairwise(points):
            for share in np.linspace(0, 1, 24):
                x, y = start + share * (end - start)
                marks.append(Bbox.from_extents(x - 2, y - 2, x + 2, y + 2))
    return marks


def _best_box(
    point: np.ndarray, width: float, height: float, taken: Sequence[Bbox], frame: Bbox, pixels: float
) -> tuple[Bbox, float]:
    """Return the nearest place in the panel where a label covers nothing, else the one where it covers least."""
    best: tuple[float, Bbox, float] | None = None
    for distance in DISTANCES:
        for dx, dy in DIRECTIONS:
            # The box's nearest edge or corner is at the distance, in the direction.
            x = point[0] + pixels * distance * dx + (dx - 1) / 2 * width
            y = point[1] + pixels * distance * dy + (dy - 1) / 2 * height
            box = Bbox.from_bounds(x, y, width, height)
            covered = sum(_overlap(box, other) for other in taken) + (width * height - _overlap(box, frame))
            if best is None or covered < best[0] - 1e-6:
                best = (covered, box, distance)
        if best is not None and best[0] < 1e-6:
            break
    assert best is not None
    return best[1], best[2]


def _overlap(a: Bbox, b: Bbox) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
