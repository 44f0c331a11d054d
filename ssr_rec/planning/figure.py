"""Draws a plan as a picture: memory of every rank and time of every rank's tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssr_rec.common.formatting import short_number
from ssr_rec.planning.cases import Case
from ssr_rec.planning.estimate import Estimate, memory_fields
from ssr_rec.planning.explain import GIB
from ssr_rec.runs.curves import COLORS, DPI

TITLES = {
    "weights": "embedding weights",
    "optimizer": "optimizer state",
    "dense": "dense weights, gradients, Adam",
    "activations": "activations",
    "buffers": "communication buffers",
    "reserved": "reserved",
}


def draw_plan(case: Case, estimate: Estimate, path: str | Path) -> None:
    """Draw memory and time per rank as a PNG of 1560 x 660 pixels."""
    figure = Figure(figsize=(13, 5.5), dpi=DPI, layout="constrained")
    step = estimate.step
    figure.suptitle(
        f"{case.schema.name} on {case.world}: estimated {short_number(estimate.samples_per_s)} samples/s, step "
        f"{step.total:.2f} ms, mostly {step.bound}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    memory, time = figure.subplots(1, 2)
    _draw_memory(memory, estimate)
    _draw_time(time, estimate)
    figure.savefig(path, format="png")


def _draw_memory(ax: Axes, estimate: Estimate) -> None:
    ranks = np.arange(len(estimate.memory))
    bottom = np.zeros(len(ranks))
    for name, color in zip(memory_fields(), COLORS, strict=False):
        values = np.array([getattr(memory, name) for memory in estimate.memory]) / GIB
        ax.bar(ranks, values, bottom=bottom, color=color, label=TITLES[name], width=0.85)
        bottom += values
    capacity = estimate.memory[0].capacity / GIB
    ax.axhline(capacity, color="#222222", linestyle="--", linewidth=1.4, label=f"the device's {capacity:.1f} GiB")
    _dress(ax, "Memory of a rank", "GiB", max(capacity, bottom.max()))


def _draw_time(ax: Axes, estimate: Estimate) -> None:
    ranks = np.arange(len(estimate.time))
    lookup = np.array([time.lookup for time in estimate.time])
    exchange = np.array([time.exchange for time in estimate.time])
    ax.bar(ranks, lookup, color=COLORS[0], label="lookup and update", width=0.85)
    ax.bar(ranks, exchange, bottom=lookup, color=COLORS[1], label="all-to-all of pooled rows", width=0.85)
    both = lookup + exchange
    ax.axhline(both.mean(), color="#222222", linestyle="--", linewidth=1.4, label=f"mean {both.mean():.3g} ms")
    _dress(ax, "Time of a rank's tables in a step", "ms", both.max())


def _dress(ax: Axes, title: str, unit: str, top: float) -> None:
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("rank")
    ax.set_ylabel(unit)
    ax.set_ylim(0, 1.08 * top or 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9)
