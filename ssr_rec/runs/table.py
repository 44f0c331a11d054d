"""Puts several finished runs side by side in words and numbers: a table and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ssr_rec.common.errors import UserError
from ssr_rec.common.formatting import decimal, short_number
from ssr_rec.runs.measures import goodness, main_measure, shown, title
from ssr_rec.runs.report import Report, Run


def best_first(runs: Sequence[Run]) -> list[Run]:
    """Return the runs by test AUC of the first task (of a number XAUC), best first; a run without one comes last.

    Raises:
        UserError: no run, or runs on different datasets.
    """
    if not runs:
        raise UserError("no runs to compare; name at least one run folder")
    first = runs[0].report
    for run in runs[1:]:
        if run.report.dataset.dataset_id != first.dataset.dataset_id:
            raise UserError(
                f"run {first.name} is on dataset {_dataset(first)}, run {run.report.name} on "
                f"{_dataset(run.report)}; compare runs on one dataset"
            )
    task, measures = next(iter(first.test.items()))
    name = main_measure(measures)
    return sorted(runs, key=lambda run: -_order(name, run.report.measure("test", task, name)))


def display_names(runs: Sequence[Run]) -> list[str]:
    """Return the over-arch's display label of each run, with the run's name where two have the same label."""
    kinds = [run.report.over_arch.kind for run in runs]
    return [
        kind if kinds.count(kind) == 1 else f"{kind} ({run.report.name})" for kind, run in zip(kinds, runs, strict=True)
    ]


def runs_table(runs: Sequence[Run]) -> str:
    """Return a Markdown table, aligned for the terminal: best run first, the dataset's ceiling (if any) on top.

    Parameters are the over-arch's, without embedding tables. Errors as in ``best_first``.
    """
    ranked = best_first(runs)
    tasks = list(ranked[0].report.test)
    names = [
        (task, name)
        for task in tasks
        for name in shown([run.report.test.get(task, {}) for run in ranked])
        if any(run.report.measure("test", task, name) is not None for run in ranked)
    ]
    header = ["over-arch", "params", "FLOPs/sample", *(f"{task} {title(name)}" for task, name in names), "samples/s"]
    lines = []
    if ranked[0].report.ceiling:
        ceiling = [decimal(ranked[0].report.measure("ceiling", task, name)) for task, name in names]
        lines.append(["ceiling", "-", "-", *ceiling, "-"])
    for run, label in zip(ranked, display_names(ranked), strict=True):
        sizes = [run.report.over_arch.num_parameters, run.report.over_arch.flops_per_sample]
        measures = [decimal(run.report.measure("test", task, name)) for task, name in names]
        lines.append([label, *map(_short, sizes), *measures, _short(run.report.samples_per_s)])
    return markdown_table(header, lines)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left, the others to the right, each as wide as its widest cell."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in [header, *lines]]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([aligned(cells[0]), aligned(rule), *map(aligned, cells[1:])])


def summary(runs: Sequence[Run]) -> str:
    """Return a sentence per task: what the best run reaches, its lead, and its share of the way from .5 to the ceiling.

    Errors as in ``best_first``.
    """
    return "\n".join(_task_summary(runs, task) for task in best_first(runs)[0].report.test)


def _task_summary(runs: Sequence[Run], task: str) -> str:
    name = main_measure(best_first(runs)[0].report.test[task])
    scored = [
        (value, label, run.report)
        for run, label in zip(runs, display_names(runs), strict=True)
        if (value := run.report.measure("test", task, name)) is not None
    ]
    if not scored:
        return f"No run has a test {title(name)} for {task}."
    scored.sort(key=lambda entry: -goodness(name, entry[0]))
    best, label, report = scored[0]
    sign = "+" if goodness(name, 1) > 0 else "-"
    sentence = f"{label} reaches {decimal(best)} {task} {title(name)}"
    if len(scored) == 2:
        sentence += f", {sign}{decimal(abs(best - scored[1][0]))} over {scored[1][1]}"
    elif len(scored) > 2:
        sentence += f", {sign}{decimal(abs(best - scored[1][0]))} over the next, {scored[1][1]}"
        sentence += f", and {sign}{decimal(abs(best - scored[-1][0]))} over the last, {scored[-1][1]}"
    ceiling = report.measure("ceiling", task, "auc")
    if ceiling is not None and ceiling > 0.5:
        share = 100 * (best - 0.5) / (ceiling - 0.5)
        sentence += f"; that is {share:.1f} % of the way from .5 to the ceiling of {decimal(ceiling)}"
    return sentence + "."


def _order(name: str, value: float | None) -> float:
    return -math.inf if value is None else goodness(name, value)


def _short(value: float | None) -> str:
    return "-" if value is None else short_number(value)


def _dataset(report: Report) -> str:
    return f"{report.dataset.name} ({str(report.dataset.dataset_id)[:12]})"
