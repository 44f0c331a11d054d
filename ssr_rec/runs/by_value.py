"""Shows what a run's evaluations are for each value of a column, such as its domain."""

from __future__ import annotations

from ssr_rec.common.formatting import decimal
from ssr_rec.runs.report import Report
from ssr_rec.runs.table import markdown_table


def by_value_header(report: Report) -> list[str]:
    """Return the titles of the columns of ``by_value_lines``."""
    assert report.by_value is not None
    return [f"{report.by_value.column}", "split", "task", "rows", "positives", "AUC", "logloss", "calibration"]


def by_value_lines(report: Report) -> list[list[str]]:
    """Return a line for each value, split and task; none of a run without."""
    if report.by_value is None:
        return []
    lines = []
    for split in ("validation", "test"):
        for task, entries in getattr(report.by_value, split).items():
            for entry in entries:
                measures = [decimal(entry.get(name)) for name in ("auc", "logloss", "calibration")]
                counts = [f"{entry[name]:,}" for name in ("rows", "positives")]
                lines.append([str(entry["value"]), split, task, *counts, *measures])
    return lines


def by_value_table(report: Report) -> str:
    """Return a Markdown table of a run's measures by value; empty of a run without."""
    lines = by_value_lines(report)
    return markdown_table(by_value_header(report), lines) if lines else ""
