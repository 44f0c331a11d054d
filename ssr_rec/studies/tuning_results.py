"""Puts a search in numbers and a picture: a row per trial, and what each setting did to the objective."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssr_rec.common.formatting import decimal, duration
from ssr_rec.runs.curves import COLORS, DPI, Decimals, Picture, lay_grid
from ssr_rec.runs.table import markdown_table
from ssr_rec.studies.trials import TrialBook
from ssr_rec.studies.tuner import metric_name, short

MOST_PANELS = 7
"""Settings that the picture shows, the most important first."""


def trials_frame(book: TrialBook) -> pd.DataFrame:
    """Return one row per trial, by number: state, value, last step that was evaluated, seconds and settings.

    The value of a pruned trial is its last evaluation's. Settings that are lists or mappings are text.
    """
    rows = []
    for trial in book.trials():
        point = {key: short(v) if isinstance(v, (list, dict)) else v for key, v in book.point(trial).items()}
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "value": math.nan if trial.value is None else trial.value,
                "steps": trial.user_attrs.get("steps", max(trial.intermediate_values, default=0)),
                "seconds": trial.user_attrs.get("seconds", math.nan),
                "problem": trial.user_attrs.get("problem", ""),
                **{key: point.get(key) for key in book.tuning.search},
            }
        )
    frame = pd.DataFrame(rows)
    # With a null among them pandas would make floats of a list's integers, and nan of the null.
    listed = [key for key, values in book.tuning.search.items() if isinstance(values, list)]
    return frame.assign(**{key: pd.Series([row[key] for row in rows], dtype=object) for key in listed})


def importances(book: TrialBook) -> dict[str, float]:
    """Return setting -> its share of the objective's variance over complete trials, largest first; {} of too few."""
    complete = book.in_state("COMPLETE")
    if len({trial.value for trial in complete}) < 2 or len(complete) < 4:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of being experimental
        found = book.optuna.importance.get_param_importances(
            book.study, evaluator=book.optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    return {key: float(share) for key, share in found.items()}


def tuning_text(book: TrialBook, frame: pd.DataFrame, shares: dict[str, float]) -> str:
    """Return a caption, a Markdown table of the trials, the best first, and which settings mattered."""
    tuning, best = book.tuning, book.best()
    counts = ", ".join(f"{count} {state}" for state, count in frame["state"].value_counts().items())
    parts = [f"**{metric_name(book.train)}**, {tuning.sampler.name} sampler, {tuning.pruner.name} pruner: {counts}."]
    ordered = frame.assign(rank=frame["state"].map({"complete": 0, "pruned": 1}).fillna(2)).sort_values(
        ["rank", "value"], ascending=[True, not book.maximizes]
    )
    lines = []
    for row in ordered.to_dict("records"):
        mark = "**" if best is not None and row["trial"] == best.number else ""
        settings = ["-" if row[key] is None else short(row[key]) for key in tuning.search]
        value = f"{mark}{decimal(row['value'])}{mark}"
        seconds = "-" if math.isnan(row["seconds"]) else duration(row["seconds"])
        lines.append([str(row["trial"]), row["state"], value, *settings, str(row["steps"]), seconds])
    parts.append(markdown_table(["trial", "state", book.train.monitor, *tuning.search, "steps", "time"], lines))
    if shares:
        said = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        parts.append(f"Share of the complete trials' variance (fANOVA): {said}.")
    failed = frame[frame["problem"] != ""]
    parts += [f"† trial {row['trial']} failed: {row['problem']}." for row in failed.to_dict("records")]
    return "\n\n".join(parts) + "\n"


def draw_tuning(book: TrialBook, frame: pd.DataFrame, shares: dict[str, float], title: str) -> Figure:
    """Return a picture: the objective by trial, with the best so far, and by the value of each setting."""
    keys = [*shares, *(key for key in book.tuning.search if key not in shares)][:MOST_PANELS]
    rows = math.ceil((len(keys) + 1) / 4)
    columns = math.ceil((len(keys) + 1) / rows)
    figure = Picture(figsize=(0.5 + 4.1 * columns, 0.6 + 3.4 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    first, *others = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    complete, pruned = (frame[frame["state"] == state] for state in ("complete", "pruned"))
    if len(complete):
        first.set_ylim(*_limits(complete["value"]))
        so_far = complete["value"].cummax() if book.maximizes else complete["value"].cummin()
        first.step(complete["trial"], so_far, where="post", color=COLORS[1], linewidth=1.4, label="best so far")
    _draw_points(first, pruned["trial"], pruned["value"], complete["trial"], complete["value"])
    first.set_title("by trial", fontsize=11, loc="left")
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    first.set_ylabel(metric_name(book.train))
    first.yaxis.set_major_formatter(Decimals())
    first.legend(frameon=False, fontsize=8.5, loc="best")
    for ax, key in zip(others, keys, strict=False):
        values = book.tuning.search[key]
        if isinstance(values, list):
            names = [short(value) for value in values]
            at = {name: float(index) for index, name in enumerate(names)}
            x = [frame.loc[part.index, key].map(lambda value, at=at: at[short(value)]) for part in (pruned, complete)]
            ax.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 6 else 0, fontsize=8)
            ax.set_xlim(-0.5, len(names) - 0.5)
        else:
            x = [part[key].astype(float) for part in (pruned, complete)]
            ax.set_xscale("log" if values.log else "linear")
        _draw_points(ax, x[0], pruned["value"], x[1], complete["value"])
        share = f"   {shares[key]:.0%}" if key in shares else ""
        ax.set_title(f"{key}{share}", fontsize=10, loc="left")
        ax.tick_params(labelleft=True)
    for ax in others[len(keys) :]:
        ax.set_visible(False)
    return figure


def _draw_points(ax: Axes, pruned_x: pd.Series, pruned: pd.Series, x: pd.Series, values: pd.Series) -> None:
    """Draw trials; those beyond the panel's frame lie as triangles on its edge."""
    lay_grid(ax)
    low, high = ax.get_ylim() if len(values) else (-math.inf, math.inf)
    styles: tuple[tuple[pd.Series, pd.Series, dict[str, Any], str], ...] = (
        (pruned_x, pruned, {"color": "#9aa3ad", "mfc": "white"}, "pruned, last evaluation"),
        (x, values, {"color": COLORS[0]}, "complete"),
    )
    for at, y, style, label in styles:
        for marker, chosen in (("o", y.between(low, high)), ("v", y < low), ("^", y > high)):
            if chosen.any():
                name = label if marker == "o" else f"{label}, beyond the frame"
                ax.plot(at[chosen], y[chosen].clip(low, high), marker, markersize=5, label=name, clip_on=False, **style)


def _limits(values: pd.Series) -> tuple[float, float]:
    """Return a frame around the middle values and the best: one that learned nothing would squeeze all the others."""
    low, high = np.quantile(values, [0.25, 0.75])
    room = 1.5 * (high - low) + 1e-4
    return max(values.min(), low - room) - 0.1 * room, min(values.max(), high + room) + 0.1 * room


def save_picture(figure: Figure, path: Path) -> None:
    """Write the picture as a PNG."""
    figure.savefig(path)
