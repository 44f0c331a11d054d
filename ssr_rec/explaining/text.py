"""Writes the answers about a model as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssr_rec.common.formatting import decimal

MOST_LINES = 25
NAMES = {"auc": "AUC", "logloss": "logloss", "calibration": "calibration"}
"""Of measures, as people write them."""


def tables(found: dict[str, Any], most: int = MOST_LINES) -> str:
    """Return all tables of what ``explain_run`` found, each of at most ``most`` lines."""
    parts = [_importance(found, most)]
    if found["filters"] is not None:
        parts.append(_filters(found["filters"], most))
    parts += [_slices(found, task, most) for task in found["slices"]]
    parts += [_calibration(found), _drift(found, most)]
    return "\n\n".join(parts)


def _importance(found: dict[str, Any], most: int) -> str:
    importance, tasks = found["importance"], list(found["tasks"])
    header = ["exchanged", *(f"{what}, {task}" for task in tasks for what in ("AUC lost", "logloss added"))]
    lines = []
    for one in importance["groups"][:most]:
        cells = [one["name"]]
        for task in tasks:
            cells += [_plus_minus(one["auc_lost"][task]), _plus_minus(one["logloss_lost"][task])]
        lines.append(cells)
    seeds = len(next(iter(importance["groups"][0]["auc"].values())))
    title = f"Permutation importance on {importance['rows']:,} rows of {found['split']}, {seeds} seeds: mean +- spread"
    return _table(title, header, lines, len(importance["groups"]))


def _filters(view: dict[str, Any], most: int) -> str:
    if view["kind"] == "static":
        title = (
            f"Fields in the static views of layer 1; by chance {view['expected_covered']:.1%} of the dims are covered"
        )
        ranked = sorted(view["fields"], key=lambda one: one["covered"])
        lines = [
            [one["field"], one["dims"], f"{one['covered']:.1%}", f"{one['views_per_dim']:.2f}", one["blind_views"]]
            for one in ranked
        ]
        return _table(title, ["field", "dims", "covered", "views per dim", "blind views"], lines[:most], len(lines))
    alive = ", ".join(f"{share:.1%}" for share in view["alive"])
    title = f"Fields behind the dims that survive in layer 1; alive by view: {alive}; never alive: {view['dead_dims']}"
    ranked = sorted(view["fields"], key=lambda one: -(one["lift"] or 0))
    lines = [[one["field"], f"{one['before']:.2%}", f"{one['after']:.2%}", decimal(one["lift"], 3)] for one in ranked]
    return _table(title, ["field", "share of all dims", "share of survivors", "lift"], lines[:most], len(lines))


def _slices(found: dict[str, Any], task: str, most: int) -> str:
    whole = found["tasks"][task]
    title = (
        f"Slices of {task}, worst {NAMES[found['order']]} first; all {found['rows']:,} rows: "
        f"AUC {decimal(whole['auc'])}, logloss {decimal(whole['logloss'])}, "
        f"calibration {decimal(whole['calibration'], 3)}"
    )
    lines = [
        [
            *(one["column"], one["value"], f"{one['rows']:,}", f"{one['positives']:,}"),
            f"{decimal(one['auc'])} +- {decimal(one['auc_se'])}",
            *(decimal(one["logloss"]), decimal(one["calibration"], 3)),
        ]
        for one in found["slices"][task]
    ]
    header = ["column", "value", "rows", "positives", "AUC", "logloss", "calibration"]
    return _table(title, header, lines[:most], len(lines))


def _calibration(found: dict[str, Any]) -> str:
    tasks = list(found["deciles"])
    header = ["tenth", *(f"{what}, {task}" for task in tasks for what in ("rows", "predicted", "observed"))]
    lines = []
    for tenth in range(max(len(parts) for parts in found["deciles"].values())):
        cells: list[Any] = [tenth + 1]
        for task in tasks:
            part = found["deciles"][task][tenth : tenth + 1]
            cells += (
                [f"{part[0]['rows']:,}", *(decimal(part[0][key]) for key in ("predicted", "observed"))]
                if part
                else [
                    "-",
                    "-",
                    "-",
                ]
            )
        lines.append(cells)
    precision = ", ".join(
        f"{task} {decimal(curve['average_precision'])}" for task, curve in found["precision_recall"].items()
    )
    return _table(f"Calibration by tenth of the rows; average precision: {precision}", header, lines, len(lines))


def _drift(found: dict[str, Any], most: int) -> str:
    lines = [
        [
            *(one["column"], f"{one['psi']:.4f}", f"{one['noise']:.4f}"),
            *(f"{_share(one['trained_' + key])} / {_share(one[key])}" for key in ("unknown", "missing")),
        ]
        for one in found["drift"]
    ]
    title = f"Drift of {found['split']} against {', '.join(_few(found['trained_on']))}"
    header = ["column", "PSI", "PSI of no drift", "unknown before / now", "missing before / now"]
    return _table(title, header, lines[:most], len(lines))


def _few(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 3 else [f"{names[0]} to {names[-1]}"]


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _plus_minus(value: dict[str, float]) -> str:
    return f"{decimal(value['mean'], 5)} +- {decimal(value['spread'], 5)}"


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[Any]], of: int) -> str:
    rows = [f"| {' | '.join(header)} |", f"|---|{'--:|' * (len(header) - 1)}"]
    rows += [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
    left = [] if len(lines) == of else [f"({of - len(lines):,} more lines in the JSON)"]
    return "\n".join([f"### {title}", "", *rows, *left])
