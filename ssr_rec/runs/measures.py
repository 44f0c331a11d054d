"""Names the measures of a task, and chooses the one that stands for it where there is room for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ssr_rec.config.ranking import is_ranking
from ssr_rec.config.training import larger_is_better

TITLES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "logloss": "logloss",
    "ne": "NE",
    "xauc": "XAUC",
    "rmse": "RMSE",
    "mae": "MAE",
    "calibration": "calibration",
}
MAIN = ("auc", "xauc", "rmse")
"""Of a binary task, of a number, and of one whose evaluations are bounded."""
BESIDE = ("auc_bound", "gauc_bound", "gauc_share", "gauc_groups", "gauc_rows", "ranking_groups", "ranking_share")
"""What says something of another measure."""


def main_measure(measures: Mapping[str, Any]) -> str:
    """Return the measure that stands for a task."""
    return next((name for name in MAIN if name in measures), MAIN[0])


def title(name: str) -> str:
    """Return what people call a measure; one of the user's own has its function's name."""
    return name.upper() if is_ranking(name) and not name.startswith("hit") else TITLES.get(name, name)


def shown(tasks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the measures that tables show of some tasks: the known ones in order, then the user's own."""
    found = {name for measures in tasks for name in measures if name not in BESIDE}
    return [*(name for name in TITLES if name in found), *sorted(found - {*TITLES})]


def goodness(name: str, value: float) -> float:
    """Return a measure so that larger is better."""
    return value if larger_is_better(name) else -value
