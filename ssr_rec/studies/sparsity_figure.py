"""Draws the sparsity of a trained over-arch: its first dense layer, or how alike its views are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ssr_rec.runs.curves import COLORS, DPI, lay_grid
from ssr_rec.studies.sparsity import MOST, NEAR_ZERO, cumulative, weight_figures

NUMBERED = 12
"""Views up to which a cell has its number in it."""


def draw_dense_layer(weight: Tensor, title: str, path: Path) -> None:
    """Draw the sizes of a dense layer's weights (fan_out, fan_in) and how few inputs hold them as a PNG (Figure 1)."""
    figure = Figure(figsize=(11, 4.2), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    sizes, held = figure.subplots(1, 2)
    size, found = weight.detach().double().abs(), weight_figures(weight)
    logs = np.log10(size.flatten().clamp_min(1e-9).numpy())
    sizes.hist(logs, bins=80, color=COLORS[0], weights=np.full(len(logs), 100 / len(logs)))
    sizes.axvline(np.log10(NEAR_ZERO), color=COLORS[1], linewidth=1.5)
    sizes.set_title(f"{found['near_zero']:.1%} of the weights are below {NEAR_ZERO:g}", fontsize=11, loc="left")
    sizes.set_xlabel("log10 of a weight's size")
    sizes.set_ylabel("% of the weights")
    for power, name, color in ((1, "mass (sum of sizes)", COLORS[0]), (2, "power (sum of squares)", COLORS[2])):
        share = cumulative(size.pow(power).sum(0)).numpy()
        held.plot(100 * np.arange(1, len(share) + 1) / len(share), 100 * share, color=color, label=name)
    held.axhline(100 * MOST, color="#444444", linestyle=":", linewidth=1.2)
    words = (
        f"{MOST:.0%} of the mass in {found['mass_dims']:.0%} of the inputs, of the power in {found['power_dims']:.0%}"
    )
    held.set_title(words, fontsize=11, loc="left")
    held.set_xlabel("% of the input dims, the heaviest first")
    held.set_ylabel("% of the weights' mass or power")
    held.legend(frameon=False, loc="lower right")
    for ax in (sizes, held):
        lay_grid(ax)
    figure.savefig(path)


def draw_views(layers: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw how alike the views of each layer are as a PNG, a row of heat maps for each measure (Figure 6).

    Args:
        layers: what ``view_figures`` returned, not empty.
    """
    words = {"cosine": "cosine of the views' projections", "overlap": "overlap of what passes"}
    names = [name for name in words if name in layers[0]]
    shape = (len(names), len(layers))
    figure = Figure(figsize=(0.6 + 4.6 * shape[1], 0.5 + 4.1 * shape[0]), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(*shape, squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for number, (ax, layer) in enumerate(zip(row, layers, strict=True), start=1):
            _draw_heat(ax, layer[name].numpy())
            ax.set_title(f"layer {number}: {words[name]}", fontsize=10, loc="left")
        bar = figure.colorbar(row[0].images[0], ax=list(row), shrink=0.85)
        bar.outline.set_visible(False)
    figure.savefig(path)


def _draw_heat(ax: Axes, matrix: np.ndarray) -> None:
    """Draw a (V, V) matrix of values from -1 to 1."""
    views = len(matrix)
    ax.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    ticks = range(0, views, max(1, views // 8))
    ax.set_xticks(ticks, [str(i + 1) for i in ticks])
    ax.set_yticks(ticks, [str(i + 1) for i in ticks])
    ax.set_xlabel("view")
    ax.set_ylabel("view")
    if views <= NUMBERED:
        for i, j in np.ndindex(views, views):
            color = "white" if abs(matrix[i, j]) > 0.6 else "black"
            ax.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
