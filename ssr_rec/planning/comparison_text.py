"""Writes several plans side by side for the terminal: what was tried, and the same job on other worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from ssr_rec.common.formatting import short_number
from ssr_rec.planning.explain import GIB, overflows
from ssr_rec.planning.remedies import Planned, Remedy
from ssr_rec.planning.report_text import days

WHAT_IF_TIMES = (1, 10, 1000)
"""How many times the training's rows are timed side by side."""


def remedy_values(remedy: Remedy) -> dict[str, Any]:
    """Return what came of a remedy, as JSON values."""
    planned = remedy.planned
    if planned is None:
        return {"name": remedy.name, "settings": remedy.settings, "fits": False, "problem": remedy.problem}
    over = overflows(planned.case, planned.found, planned.estimate)
    return {
        "name": remedy.name,
        "settings": remedy.settings,
        "fits": planned.fits,
        "world": str(planned.case.world),
        "least_headroom_bytes": min(memory.headroom for memory in planned.estimate.memory),
        "missing_bytes": over[0].missing_bytes if over else 0,
        "samples_per_s": planned.estimate.samples_per_s if planned.fits else None,
        "step_ms": planned.estimate.step.total if planned.fits else None,
        "waiting_share": planned.estimate.waiting_share if planned.fits else None,
    }


def remedies_text(remedies: Sequence[Remedy], aim: str = "fit") -> str:
    """Return what was tried to make a plan fit, or, for the aim ``balance``, to make it even."""
    rows = []
    for remedy in remedies:
        values = remedy_values(remedy)
        if "problem" in values:
            rows.append([remedy.name, remedy.settings, "cannot be", values["problem"]])
        elif values["fits"]:
            room = f"{values['least_headroom_bytes'] / GIB:.1f} GiB of room on the fullest rank"
            waits = f"waiting adds {100 * values['waiting_share']:.1f} %"
            speed = f"{short_number(values['samples_per_s'])} samples/s, step {values['step_ms']:.2f} ms"
            rows.append([remedy.name, remedy.settings, "fits", f"{room if aim == 'fit' else waits}, {speed}"])
        else:
            missing = f"{values['missing_bytes'] / GIB:.1f} GiB missing on the fullest rank"
            rows.append([remedy.name, remedy.settings, "does not fit", missing])
    head = ["tried", "settings", "result", "estimate"]
    return f"What would make it {aim}, each planned anew:\n" + tabulate(rows, head, tablefmt="simple")


def what_if_values(worlds: Sequence[Planned], total_rows: float) -> list[dict[str, Any]]:
    """Return the worlds side by side; efficiency is samples/s a rank against the first world that fits.

    Args:
        total_rows: of the whole training, in rows.
    """
    first = next((planned for planned in worlds if planned.fits), None)
    values = []
    for planned in worlds:
        case, estimate = planned.case, planned.estimate
        row: dict[str, Any] = {
            "world": f"{case.world.nodes}x{case.world.per_node}",
            "fits": planned.fits,
            "batch_size": case.config.train.batch_size,
            "least_headroom_bytes": min(memory.headroom for memory in estimate.memory),
        }
        if planned.fits and first is not None:
            per_rank = estimate.samples_per_s / case.world.size
            row |= {
                "step_ms": estimate.step.total,
                "samples_per_s": estimate.samples_per_s,
                "samples_per_s_range": estimate.samples_range,
                "efficiency": per_rank / (first.estimate.samples_per_s / first.case.world.size),
                "days": {f"{rows:g}": estimate.days(rows) for rows in _what_if_rows(total_rows)},
                "communication_samples_per_s": estimate.communication_samples_per_s,
                "bound": estimate.step.bound,
                "waiting_share": estimate.waiting_share,
            }
        values.append(row)
    return values


def _what_if_rows(total_rows: float) -> list[float]:
    return [times * total_rows for times in WHAT_IF_TIMES]


def what_if_text(worlds: Sequence[Planned], total_rows: float) -> str:
    """Return the worlds as a table, errors and arguments as in ``what_if_values``."""
    case = worlds[0].case
    rows = []
    for row in what_if_values(worlds, total_rows):
        start = [row["world"], short_number(row["batch_size"]), f"{row['least_headroom_bytes'] / GIB:.1f}"]
        if not row["fits"]:
            rows.append([start[0], start[1], "no", start[2], *["-"] * 8])
            continue
        times = [days(count) for count in row["days"].values()]
        rows.append(
            [
                start[0],
                start[1],
                "yes",
                start[2],
                f"{row['step_ms']:.2f}",
                short_number(row["samples_per_s"]),
                f"{100 * row['efficiency']:.0f} %",
                *times,
                short_number(row["communication_samples_per_s"]),
                row["bound"],
            ]
        )
    head = ["world", "batch", "fits", "room GiB", "step ms", "samples/s", "efficiency"]
    head += [f"{short_number(count)} rows" for count in _what_if_rows(total_rows)]
    head += ["comm. bound", "mostly"]
    return (
        f"{case.schema.name} on {case.world.hardware.name} hosts\n"
        + tabulate(rows, head, tablefmt="simple", disable_numparse=True)
        + "\nroom: on the fullest rank. efficiency: samples/s a rank against the first world that fits. comm. bound: "
        "samples/s if only communication took time.\n"
        f"Expect samples/s within {worlds[0].estimate.within:g} times either way: docs/planner.md"
    )
