"""Compares runs by days: what each next day showed before it was trained on, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ssr_rec.common.formatting import decimal
from ssr_rec.runs.curves import DPI, Decimals, lay_grid, legend_below, style
from ssr_rec.runs.measures import goodness, main_measure, title
from ssr_rec.runs.report import Run
from ssr_rec.runs.table import display_names, markdown_table

MEASURES = {
    "auc": "AUC", "gauc": "GAUC", "ne": "NE", "xauc": "XAUC", "rmse": "RMSE", "calibration": "calibration",
}  # fmt: skip


def days_table(runs: Sequence[Run]) -> str:
    """Return a Markdown table of each task: a line per day that a run evaluated, and the mean of each run's days.

    With two runs a sentence says on how many days the first is ahead, and by how much on average.
    """
    tasks = list(runs[0].report.test)
    return "\n\n".join(f"{task}\n\n{_task_table(runs, task)}" for task in tasks)


def _task_table(runs: Sequence[Run], task: str) -> str:
    days = _days(runs)
    columns = [(name, run) for name in MEASURES for run in range(len(runs)) if _has(runs[run], task, name)]
    labels = [f"{label} " for label in display_names(runs)] if len(runs) > 1 else [""]
    header = ["next day", *(f"{labels[run]}{MEASURES[name]}" for name, run in columns)]
    values = {(name, run): _values(runs[run], days, task, name) for name, run in columns}
    lines = [[day, *(decimal(values[column][at]) for column in columns)] for at, day in enumerate(days)]
    lines.append(["mean", *(decimal(runs[run].report.test[task].get(name)) for name, run in columns)])
    table = markdown_table(header, lines)
    # A number's measures differ where one of the runs is bounded.
    both = {name: 0 for name in MEASURES if all((name, run) in values for run in range(len(runs)))}
    return (
        table
        if len(runs) != 2 or (main := main_measure(both)) not in both
        else f"{table}\n\n{_lead(runs, values, main)}"
    )


def _lead(runs: Sequence[Run], values: dict[tuple[str, int], np.ndarray], main: str) -> str:
    """Return the first run's AUC against the second's; days differ more among each other than the runs on one day."""
    first, second = display_names(runs)
    ahead = (values[main, 0] - values[main, 1]) * goodness(main, 1)
    ahead = ahead[~np.isnan(ahead)]
    if len(ahead) < 2:
        return f"{first} and {second} have {len(ahead)} days in common."
    error = ahead.std(ddof=1) / np.sqrt(len(ahead))
    return (
        f"{first} is ahead of {second} by {title(main)} on {(ahead > 0).sum()} of {len(ahead)} days, "
        f"by {decimal(ahead.mean())} +- {decimal(error)} (standard error over the days) on average."
    )


def draw_days(runs: Sequence[Run], path: str | Path) -> None:
    """Draw the ``MEASURES`` that there are by day as a PNG: a row of panels per task, a line per run."""
    days, tasks = _days(runs), list(runs[0].report.test)
    names = [name for name in MEASURES if any(_has(run, task, name) for run in runs for task in tasks)]
    size = (4.2 * len(names), 3.7 * len(tasks))
    # Tick labels are measured before they are written without their zeros: a margin, or some are cut off.
    figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    panels = figure.subplots(len(tasks), len(names), squeeze=False)
    figure.suptitle("Each next day, evaluated before it is trained on", fontsize=11, x=0.01, ha="left")
    for task, row in zip(tasks, panels, strict=True):
        for name, panel in zip(names, row, strict=True):
            _draw(panel, runs, days, task, name)
    figure.savefig(path)


def _draw(ax: Axes, runs: Sequence[Run], days: Sequence[str], task: str, name: str) -> None:
    ax.set_title(f"{MEASURES[name]}, {task}", fontsize=11, loc="left", fontweight="bold")
    if name == "calibration":
        ax.axhline(1.0, color="#444444", linestyle=":", linewidth=1.2)
    for index, (run, label) in enumerate(zip(runs, display_names(runs), strict=True)):
        values = _values(run, days, task, name)
        mean = decimal(run.report.test.get(task, {}).get(name))
        ax.plot(range(len(days)), values, linewidth=1.6, markersize=4, label=f"{label}: mean {mean}", **style(index))
    lay_grid(ax)
    ax.yaxis.set_major_formatter(Decimals())
    ticks = range(0, len(days), -(-len(days) // 7))
    ax.set_xticks(ticks, [days[tick] for tick in ticks], rotation=35, ha="right", fontsize=8)
    legend_below(ax, ax.get_legend_handles_labels()[0], columns=1, at=-0.3)


def _days(runs: Sequence[Run]) -> list[str]:
    """Return the days that any run evaluated, in order of time, as the preparation has it."""
    days = {row.day for run in runs for row in run.report.days}
    return sorted(days, key=int) if all(day.isdecimal() for day in days) else sorted(days)


def _has(run: Run, task: str, name: str) -> bool:
    return any(row.tasks.get(task, {}).get(name) is not None for row in run.report.days)


def _values(run: Run, days: Sequence[str], task: str, name: str) -> np.ndarray:
    found = {row.day: row.tasks.get(task, {}).get(name) for row in run.report.days}
    return np.array([found.get(day) for day in days], dtype=float)
