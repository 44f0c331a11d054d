"""Draws runs: the curves of one (curves.png), and several runs side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from ssr_rec.common.formatting import decimal, short_number
from ssr_rec.runs.measures import main_measure, title
from ssr_rec.runs.report import Report, Run
from ssr_rec.runs.table import best_first, display_names

DPI = 120
COLORS = ("#1f6fb4", "#d9541e", "#2f8f4e", "#8a4fa8", "#b5891a", "#c23b6b", "#3aa0a8", "#6b6b6b")
MARKERS = "osD^vP*X"


class Picture(Figure):
    """Is a matplotlib figure that a notebook shows, also where pyplot has set nothing up."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


class Decimals(ScalarFormatter):
    """Writes ticks such as .700 and .725, all with the same number of digits."""

    def __init__(self) -> None:
        super().__init__(useOffset=False)

    def __call__(self, x: float, pos: int | None = None) -> str:
        text = super().__call__(x, pos)
        return text.replace("0.", ".", 1) if text.startswith("0.") else text


def draw_curves(rows: Sequence[Mapping[str, Any]], report: Report, path: str | Path) -> None:
    """Write ``curves_figure`` as a PNG of 1560 x 540 pixels."""
    curves_figure(rows, report).savefig(path)


def curves_figure(rows: Sequence[Mapping[str, Any]], report: Report) -> Figure:
    """Return a figure of training loss, validation AUC (of numbers XAUC) and throughput of one run against samples.

    Args:
        rows: the run's metrics.jsonl; may be empty.
        report: the run's; what it lacks is left out of the picture.
    """
    figure = Picture(figsize=(13, 4.5), dpi=DPI, layout="constrained")
    figure.suptitle(_headline(report), fontsize=11, x=0.01, ha="left")
    loss, quality, speed = figure.subplots(1, 3)
    _draw_loss(loss, rows)
    _draw_validation_auc(quality, rows, report)
    _draw_speed(speed, rows)
    return figure


def draw_comparison(runs: Sequence[Run], path: str | Path) -> None:
    """Write ``comparison_figure`` as a PNG; errors as there."""
    comparison_figure(runs).savefig(path)


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Return a figure of several runs on one dataset: one line of panels per task, validation AUC and test AUC.

    Args:
        runs: at least one, in any order; the best is drawn on top.

    Raises:
        UserError: no run, or runs on different datasets.
    """
    ranked = best_first(runs)
    names = display_names(ranked)
    tasks = list(ranked[0].report.test)
    height = max(3.6, 1.4 + 0.3 * len(ranked))
    figure = Picture(figsize=(13, height * len(tasks)), dpi=DPI, layout="constrained")
    figure.suptitle(_dataset(ranked[0].report), fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(1.15, 1))
    for (history, final), task in zip(panels, tasks, strict=True):
        _draw_histories(history, ranked, task)
        _draw_test_auc(final, ranked, names, task)
    return figure


def _draw_loss(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    samples, values = _series(rows, "train", "loss")
    measured = [measures for row in rows for measures in (row.get("tasks") or {}).values()]
    is_nats = not any({"rmse", "xauc"} & measures.keys() for measures in measured)
    _dress(ax, "Training loss", "loss (nats per sample)" if is_nats else "loss per sample", bool(len(values)))
    if not len(values):
        return
    if len(values) > 1:
        ax.plot(samples, values, color=COLORS[0], alpha=0.25, linewidth=1, label="since the last line")
    marker = "o" if len(values) == 1 else None
    ax.plot(samples, _smooth(values), color=COLORS[0], linewidth=1.8, marker=marker, label="moving mean")
    if len(values) >= 20:
        # The first steps start far above the rest and would flatten it.
        low, high = np.percentile(values, (0, 97))
        margin = 0.05 * (high - low) or 0.01
        ax.set_ylim(low - margin, high + margin)
    ax.yaxis.set_major_formatter(Decimals())
    legend_below(ax, ax.get_lines())


def _draw_validation_auc(ax: Axes, rows: Sequence[Mapping[str, Any]], report: Report) -> None:
    tasks = list(dict.fromkeys(task for row in rows if row["split"] == "validation" for task in row.get("tasks") or {}))
    found = [row["tasks"] for row in rows if row["split"] == "validation" and row.get("tasks")]
    mains = {task: next(main_measure(measured[task]) for measured in found if task in measured) for task in tasks}
    # Shares of pairs have one scale; errors in units of a label are drawn where there is nothing else.
    drawn = [task for task in tasks if mains[task] != "rmse"] or tasks
    series = {task: _series(rows, "validation", mains[task], task) for task in drawn}
    series = {task: points for task, points in series.items() if len(points[0])}
    names = " and ".join(title(name) for name in dict.fromkeys(mains[task] for task in drawn)) or "AUC"
    _dress(ax, f"Validation {names}", names, bool(series))
    if not series:
        return
    by_days = bool(report.days)
    styles: dict[Literal["test", "ceiling"], Literal["--", ":"]] = {"test": "--", "ceiling": ":"}
    levels: dict[str, Line2D] = {}
    for (task, (samples, values)), color in zip(series.items(), cycle(COLORS), strict=False):
        # Test and validation are of the kept weights, whose step need not be the best one of every task.
        main = mains[task]
        label = task if by_days else f"{task}: validation {decimal(report.measure('validation', task, main))}"
        for name, linestyle in styles.items():
            level = report.measure(name, task, main)
            if level is not None:
                ax.axhline(level, color=color, linestyle=linestyle, linewidth=1.4)
                levels[name] = Line2D([], [], color="#444444", linestyle=linestyle, linewidth=1.4, label=name)
                label += f", {'mean' if by_days and name == 'test' else name} {decimal(level)}"
        ax.plot(samples, values, color=color, linewidth=1.8, marker="o", markersize=4, label=label)
    kept = [row["samples"] for row in rows if row["split"] == "validation" and row["step"] == report.best_step]
    if kept and not by_days:
        ax.axvline(kept[-1], color="#444444", linewidth=0.8, alpha=0.6)
        levels["kept"] = Line2D([], [], color="#444444", linewidth=0.8, alpha=0.6, label="kept weights")
    ax.yaxis.set_major_formatter(Decimals())
    legend_below(ax, [*ax.get_legend_handles_labels()[0], *levels.values()], columns=1)


def _draw_speed(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    samples, rates = _series(rows, "train", "samples_per_s")
    waits_at, waits = _series(rows, "train", "data_wait")
    _dress(ax, "Speed", "samples/s", bool(len(rates)))
    if not len(rates):
        return
    marker = "o" if len(rates) == 1 else None
    ax.plot(samples, rates, color=COLORS[0], linewidth=1.5, marker=marker, label="samples/s (left)")
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_ylim(0, 1.15 * rates.max() or 1)
    wait_ax = ax.twinx()
    wait_ax.plot(waits_at, 100 * waits, color=COLORS[1], linewidth=1.5, marker=marker, label="waiting for data (right)")
    # Never a scale on which a fraction of a percent looks like a problem.
    wait_ax.set_ylim(0, min(105, max(5, 140 * waits.max(initial=0))))
    wait_ax.set_ylabel("waiting for data (% of the time)")
    wait_ax.spines[["top", "left"]].set_visible(False)
    legend_below(ax, [*ax.get_lines(), *wait_ax.get_lines()])


def _draw_histories(ax: Axes, ranked: Sequence[Run], task: str) -> None:
    main = main_measure(ranked[0].report.test[task])
    curves = [_series(run.rows, "validation", main, task) for run in ranked]
    has_data = any(len(values) for _, values in curves)
    _dress(ax, f"Validation {title(main)}, {task}", title(main), has_data)
    if not has_data:
        return
    for index, (samples, values) in reversed(list(enumerate(curves))):
        ax.plot(samples, values, markersize=4, linewidth=1.6, **style(index))
    ax.yaxis.set_major_formatter(Decimals())


def _draw_test_auc(ax: Axes, ranked: Sequence[Run], names: Sequence[str], task: str) -> None:
    """Draw points with numbers, best on top; with the markers of the curves, this panel is also their legend."""
    main = main_measure(ranked[0].report.test[task])
    aucs = [run.report.measure("test", task, main) for run in ranked]
    ceiling = ranked[0].report.measure("ceiling", task, main)
    for index, value in enumerate(aucs):
        if value is not None:
            ax.plot([value], [index], markersize=8, **style(index))
            ax.annotate(
                decimal(value), (value, index), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9
            )
    known = [value for value in [*aucs, ceiling] if value is not None]
    _dress(ax, f"Test {title(main)}, {task}", "", bool(known))
    ax.set_xlabel(title(main))
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    for label, index in zip(ax.get_yticklabels(), range(len(names)), strict=True):
        label.set_color(style(index)["color"])
    if not known:
        return
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(Decimals())
    # Room on the right for the number beside the best point.
    span = max(known) - min(known) or 0.01
    ax.set_xlim(min(known) - 0.08 * span, max(known) + 0.2 * span)
    if ceiling is not None:
        line = ax.axvline(ceiling, color="#444444", linestyle=":", linewidth=1.4, label=f"ceiling {decimal(ceiling)}")
        legend_below(ax, [line])


def _series(
    rows: Sequence[Mapping[str, Any]], split: str, name: str, task: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(samples (P,), values (P,))`` of one measure of a split, without the rows that lack it."""
    points = []
    for row in rows:
        source = row if task is None else (row.get("tasks") or {}).get(task, {})
        value = source.get(name)
        if row["split"] == split and value is not None and math.isfinite(value):
            points.append((row["samples"], value))
    return np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return centred moving mean over a twentieth of the points; shorter at the ends, so that nothing is padded in."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _headline(report: Report) -> str:
    """Return what ran on what: name, over-arch, dataset, ranks."""
    kind, parameters, ranks = report.over_arch.kind, report.over_arch.num_parameters, report.world_size
    if kind and parameters is not None:
        kind += f" ({short_number(parameters)} parameters)"
    parts = [
        report.name,
        kind,
        _dataset(report),
        f"{ranks} rank{'s' if ranks > 1 else ''}" if ranks else None,
    ]
    return "   ·   ".join(part for part in parts if part)


def _dataset(report: Report) -> str:
    rows = f", {short_number(report.dataset.num_rows)} rows" if report.dataset.num_rows else ""
    return f"{report.dataset.name or ''}{rows}"


def style(index: int) -> dict[str, Any]:
    """Return colour and marker of the run at ``index``; both differ between neighbours, and the pair among 64 runs."""
    color, marker = COLORS[index % len(COLORS)], MARKERS[(index + index // len(COLORS)) % len(MARKERS)]
    return {"color": color, "marker": marker}


def _dress(ax: Axes, title: str, ylabel: str, has_data: bool) -> None:
    """Give a panel the look that all share; say so when there is nothing to show."""
    ax.set_title(title, fontsize=11, loc="left", fontweight="bold")
    ax.set_xlabel("training samples")
    ax.set_ylabel(ylabel)
    lay_grid(ax)
    if not has_data:
        ax.text(0.5, 0.5, "no values yet", transform=ax.transAxes, ha="center", color="#777777")
        ax.set_xticks([])
        ax.set_yticks([])
        return
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5))


def lay_grid(ax: Axes) -> None:
    """Put a pale grid behind what is drawn, and leave out the frame above and to the right."""
    ax.grid(True, color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, handles: Sequence[Artist], columns: int = 2, at: float = -0.16) -> None:
    """Draw a legend under the panel, where it cannot cover a curve; ``at``: its top in heights of the panel."""
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, at), "frameon": False, "fontsize": 8.5}
    ax.legend(handles=list(handles), ncols=columns, columnspacing=1.2, handlelength=1.8, **below)
