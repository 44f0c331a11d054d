"""Draws the answers about a model: one PNG each for importance, filters, slices, calibration and drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ssr_rec.common.formatting import decimal
from ssr_rec.explaining.text import NAMES
from ssr_rec.runs.curves import COLORS, DPI, Decimals, Picture, lay_grid

MOST_BARS = 30
NOTED, LARGE = 0.1, 0.25
"""PSI from which practice speaks of a shift that is worth a look, and of a large one."""


def draw_all(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw everything that was found and return the paths.

    Args:
        found: what ``explain_run`` returns.
        folder: of the pictures; there.
    """
    drawn = {"importance.png": importance_figure, "slices.png": slices_figure, "calibration.png": calibration_figure}
    drawn["drift.png"] = drift_figure
    if found["filters"] is not None:
        drawn["filters.png"] = filters_figure
    for name, draw in drawn.items():
        draw(found).savefig(folder / name)
    return [folder / name for name in drawn]


def importance_figure(found: Mapping[str, Any]) -> Figure:
    """Return a figure of logloss added and AUC lost by feature, every seed a dot, as a PNG."""
    groups, tasks = found["importance"]["groups"][:MOST_BARS], list(found["tasks"])
    left_out = len(found["importance"]["groups"]) - len(groups)
    figure = _figure(13, 1.6 + 0.3 * len(groups) * max(1, len(tasks) / 2), found, "what the model relies on")
    panels = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(tasks)
    for ax, measure, title in zip(panels, ("logloss", "auc"), ("logloss added (nats a row)", "AUC lost"), strict=True):
        for i, task in enumerate(tasks):
            places = np.arange(len(groups)) + (i - (len(tasks) - 1) / 2) * height
            values = np.array([one[measure][task] for one in groups])
            color = COLORS[i % len(COLORS)]
            ax.barh(places, values.mean(1), height=0.9 * height, color=color, alpha=0.55, label=task)
            ax.scatter(values.ravel(), np.repeat(places, values.shape[1]), s=7, color=color, zorder=3)
        ax.axvline(0, color="#444444", linewidth=0.8)
        ax.set_title(f"{title} when exchanged", fontsize=11, loc="left", fontweight="bold")
        ax.set_xlabel("dots: single permutations" + (f"; {left_out} less important ones left out" if left_out else ""))
        lay_grid(ax)
    panels[0].set_yticks(range(len(groups)), [one["name"] for one in groups])
    panels[0].set_ylim(len(groups) - 0.4, -0.6)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def filters_figure(found: Mapping[str, Any]) -> Figure:
    """Return a figure of what the filter of SSR's first layer lets through of each field, as a PNG."""
    view = found["filters"]
    names = [one["field"] for one in view["fields"]]
    heat = np.array(view["heat"], dtype=float).T  # (F, V)
    figure = _figure(13, 1.6 + 0.22 * len(names), found, "the filter of SSR's first layer")
    bars, grid = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.3))
    places = np.arange(len(names))
    if view["kind"] == "static":
        bars.barh(places, [one["covered"] for one in view["fields"]], color=COLORS[0], alpha=0.6)
        bars.axvline(view["expected_covered"], color=COLORS[1], linewidth=1.4, linestyle="--", label="by chance")
        bars.set_title("dims that some view sees", fontsize=11, loc="left", fontweight="bold")
        bars.xaxis.set_major_formatter(PercentFormatter(1.0))
        label = "dims that the view sees"
    else:
        bars.barh(places, [one["lift"] or 0 for one in view["fields"]], color=COLORS[0], alpha=0.6)
        bars.axvline(1, color=COLORS[1], linewidth=1.4, linestyle="--", label="as before the filter")
        bars.set_title("share of survivors / share of all dims", fontsize=11, loc="left", fontweight="bold")
        label = "share of the view's survivors"
    lay_grid(bars)
    bars.set_yticks(places, names, fontsize=8)
    bars.set_ylim(len(names) - 0.4, -0.6)
    figure.legend(handles=bars.get_lines(), loc="outside lower left", frameon=False, fontsize=9)
    image = grid.imshow(heat, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0)
    views = heat.shape[1]
    alive = view.get("alive")
    ticks = [f"{v + 1}" + (f"\n{alive[v]:.0%}" if alive and views <= 16 else "") for v in range(views)]
    grid.set_xticks(range(views), ticks) if views <= 32 else None
    grid.set_xlabel("view" + (", and its dims alive" if alive and views <= 16 else ""))
    grid.set_title(label, fontsize=11, loc="left", fontweight="bold")
    figure.colorbar(image, ax=grid, shrink=0.6)
    return figure


def slices_figure(found: Mapping[str, Any]) -> Figure:
    """Return a figure of AUC and calibration of the worst slices of each task as a PNG."""
    tasks = list(found["slices"])
    lines = max(1, max(min(MOST_BARS, len(found["slices"][task])) for task in tasks))
    figure = _figure(13, (1.2 + 0.26 * lines) * len(tasks), found, f"slices, worst {NAMES[found['order']]} first")
    panels = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    for (area, ratio), task in zip(panels, tasks, strict=True):
        entries = found["slices"][task][:MOST_BARS]
        places, whole = np.arange(len(entries)), found["tasks"][task]
        names = [f"{one['column']} = {_short(one['value'])} ({one['rows']:,})" for one in entries]
        errors = [0 if math.isnan(one["auc_se"]) else one["auc_se"] for one in entries]
        area.errorbar([one["auc"] for one in entries], places, xerr=errors, fmt="o", color=COLORS[0], markersize=5)
        _level(area, whole["auc"], "all rows")
        area.set_title(f"{task}: AUC and its standard error", fontsize=11, loc="left", fontweight="bold")
        area.xaxis.set_major_formatter(Decimals())
        ratio.plot([one["calibration"] for one in entries], places, "s", color=COLORS[1], markersize=5)
        _level(ratio, whole["calibration"], "all rows")
        ratio.set_title(f"{task}: calibration (predicted / observed)", fontsize=11, loc="left", fontweight="bold")
        area.set_yticks(places, names, fontsize=8)
        area.set_ylim(lines - 0.4, -0.6)
        for ax in (area, ratio):
            lay_grid(ax)
    return figure


def calibration_figure(found: Mapping[str, Any]) -> Figure:
    """Return a figure of the reliability diagram and the precision-recall curve of each task as a PNG."""
    tasks = list(found["deciles"])
    figure = _figure(11, 4.6 * len(tasks), found, "calibration")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for (diagram, curve), task in zip(panels, tasks, strict=True):
        parts, color = found["deciles"][task], COLORS[0]
        predicted, observed, rows = (
            np.array([part[key] for part in parts], dtype=float) for key in ("predicted", "observed", "rows")
        )
        most = max(predicted.max(initial=0), observed.max(initial=0)) * 1.08 or 1.0
        diagram.plot([0, most], [0, most], color="#444444", linestyle=":", linewidth=1.2, label="calibrated")
        errors = 2 * np.sqrt(observed * (1 - observed) / np.maximum(rows, 1))
        diagram.errorbar(predicted, observed, yerr=errors, fmt="o-", color=color, label="a tenth of the rows, +- 2 SE")
        diagram.set(xlim=(0, most), ylim=(0, most), xlabel="mean prediction", ylabel="share of positive rows")
        _title(diagram, f"{task}: reliability, ratio {decimal(found['tasks'][task]['calibration'], 3)}")
        precision = found["precision_recall"][task]
        curve.plot(precision["recall"], precision["precision"], color=color, linewidth=1.8, label="model")
        if len(rows):
            base = float((observed * rows).sum() / rows.sum())
            curve.axhline(base, color="#444444", linestyle=":", linewidth=1.2, label="any order")
        curve.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        _title(curve, f"{task}: precision and recall, average precision {decimal(precision['average_precision'])}")
        for ax in (diagram, curve):
            lay_grid(ax)
            ax.legend(frameon=False, fontsize=9, loc="upper left" if ax is diagram else "upper right")
    return figure


def drift_figure(found: Mapping[str, Any]) -> Figure:
    """Return a figure of the PSI of every column as a PNG."""
    entries = found["drift"][: 2 * MOST_BARS]
    figure = _figure(9, 1.6 + 0.24 * len(entries), found, "drift of the inputs against training")
    ax = figure.subplots()
    places = np.arange(len(entries))
    ax.barh(places, [one["psi"] for one in entries], color=COLORS[0], alpha=0.6, label="PSI")
    ax.plot(
        [one["noise"] for one in entries], places, "|", color="#444444", markersize=10, label="of no drift, by chance"
    )
    for level, color, name in ((NOTED, COLORS[4], "0.1: look"), (LARGE, COLORS[1], "0.25: large")):
        ax.axvline(level, color=color, linestyle="--", linewidth=1.2, label=name)
    ax.set_yticks(places, [one["column"] for one in entries], fontsize=8)
    ax.set_ylim(len(entries) - 0.4, -0.6)
    ax.set_xscale("symlog", linthresh=0.1)
    ax.set_xlim(left=0)
    ax.set_xticks([0, 0.05, 0.1, 0.25, 1, 3], ["0", ".05", ".1", ".25", "1", "3"])
    ax.set_xlim(0, max(0.5, 1.2 * max(one["psi"] for one in entries)))
    ax.set_xlabel("population stability index")
    lay_grid(ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float, found: Mapping[str, Any], what: str) -> Figure:
    figure = Picture(figsize=(width, max(3.2, height)), dpi=DPI, layout="constrained")
    title = f"{found['run']}   ·   {found['over_arch']}   ·   {found['dataset']}, {found['split']}: {what}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=11, loc="left", fontweight="bold")


def _level(ax: Axes, value: float, label: str) -> None:
    if not math.isnan(value):
        ax.axvline(value, color="#444444", linestyle=":", linewidth=1.3)
        ax.annotate(
            label,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=8,
        )


def _short(text: Sequence[str] | str, most: int = 24) -> str:
    text = str(text)
    return text if len(text) <= most else text[: most - 1] + "…"
