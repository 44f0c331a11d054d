"""Writes finished runs as one HTML page that needs nothing beside it: tables, curves, configs, environments."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from ssr_rec.common.formatting import decimal, duration, short_number
from ssr_rec.runs.by_value import by_value_header, by_value_lines
from ssr_rec.runs.curves import draw_comparison, draw_curves
from ssr_rec.runs.folder import CONFIG_FILE, CURVES_FILE
from ssr_rec.runs.measures import main_measure, shown, title
from ssr_rec.runs.report import Report, Run, read_run
from ssr_rec.runs.table import display_names, runs_table, summary

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
h1, h2, h3 { line-height: 1.2; margin: 1.4em 0 .4em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .2em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f5f5f5; overflow-x: auto; padding: .7em; }
.warning { color: #a33; }
"""


def runs_page(folders: Sequence[str | Path]) -> str:
    """Return the page of finished runs on one dataset.

    Raises:
        UserError: a folder without a finished run, or runs on different datasets.
    """
    runs = [read_run(folder) for folder in folders]
    title = ", ".join(display_names(runs))
    parts = [f"<h1>{escape(title)}</h1>", _of_markdown(runs_table(runs))]
    parts += [f"<p>{escape(line)}</p>" for line in summary(runs).splitlines()]
    with TemporaryDirectory(prefix="ssr_rec.") as pictures:
        if len(runs) > 1:
            draw_comparison(runs, picture := Path(pictures) / "comparison.png")
            parts.append(_picture(picture, "validation AUC against samples, and test AUC"))
        for folder, run in zip(folders, runs, strict=True):
            parts += _of_run(Path(folder), run, Path(pictures))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _of_run(folder: Path, run: Run, pictures: Path) -> Iterator[str]:
    """Yield the section of a run."""
    report = run.report
    yield f"<h2>{escape(report.over_arch.kind)}</h2>"
    yield f"<p>Run {escape(str(report.name))} on {escape(str(report.dataset.name))}, {escape(str(folder))}</p>"
    yield from (f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings)
    yield _measures(report)
    draw_curves(run.rows, report, curves := pictures / CURVES_FILE)
    yield _picture(curves, "training loss, validation AUC and speed against samples")
    for path in sorted(folder.glob("*.png")):
        if path.name != CURVES_FILE:
            yield f"<h3>{escape(path.stem.replace('_', ' '))}</h3>" + _picture(path, path.stem)
    if lines := by_value_lines(report):
        yield "<h3>Measures by value</h3>" + _table(by_value_header(report), lines)
    yield _evaluations(run)
    yield "<h3>Cost</h3>" + _table(["", ""], [[name, value] for name, value in _facts(report) if value is not None])
    if report.sequences:
        names = ["kind", "max_length", "fields", "num_parameters", "flops_per_sample"]
        lines = [[key, *(str(of.get(name, "-")) for name in names)] for key, of in report.sequences.items()]
        yield "<h3>Sequences</h3>" + _table(["sequence", *names], lines)
    if (folder / CONFIG_FILE).is_file():
        yield f"<details><summary>Config</summary><pre>{escape((folder / CONFIG_FILE).read_text())}</pre></details>"
    found = report.values()
    where = {**(found.get("versions") or {}), **(found.get("hardware") or {}), "git commit": found.get("git_commit")}
    lines = [[str(key), str(value)] for key, value in where.items() if value is not None]
    yield f"<details><summary>Environment</summary>{_table(['', ''], lines)}</details>"


def _facts(report: Report) -> Iterator[tuple[str, str | None]]:
    """Yield what a run cost; None where its report does not say."""

    def shown(value: float | None, unit: str = "") -> str | None:
        return None if value is None else short_number(value) + unit

    yield "parameters of the over-arch", shown(report.over_arch.num_parameters)
    yield "parameters of the tables", shown(report.num_embedding_parameters)
    yield "FLOPs of a sample", shown(report.over_arch.flops_per_sample)
    yield "rows of an epoch", shown(report.dataset.num_rows)
    yield "steps", None if report.steps is None else f"{report.steps:,}"
    yield "epochs", None if report.epochs is None else f"{report.epochs:g}"
    yield "best step", None if report.best_step is None else f"{report.best_step:,}"
    yield "training time", None if report.seconds is None else duration(report.seconds)
    yield "samples/s", shown(report.samples_per_s)
    yield "waited for data", None if report.data_wait is None else f"{100 * report.data_wait:.1f} %"
    yield "ranks", None if report.world_size is None else str(report.world_size)
    yield "seed", None if report.seed is None else str(report.seed)


def _measures(report: Report) -> str:
    lines = []
    names = shown([*report.validation.values(), *report.test.values()])
    for part in ("ceiling", "validation", "test"):
        for task in getattr(report, part):
            values = [report.measure(part, task, name) for name in names]
            lines.append([f"{part} {task}", *map(decimal, values)])
    return "<h3>Measures</h3>" + _table(["", *map(title, names)], lines)


def _evaluations(run: Run) -> str:
    """Return the table of the validations on the way."""
    rows = [row for row in run.rows if row["split"] == "validation"]
    tasks = {task: main_measure(measures) for task, measures in rows[0]["tasks"].items()} if rows else {}
    lines = []
    for row in rows:
        values = [decimal(row["tasks"][task].get(name)) for task, name in tasks.items()]
        lines.append([f"{row['step']:,}", short_number(row.get("samples") or 0), decimal(row.get("loss")), *values])
    loss = "logloss" if {*tasks.values()} <= {"auc"} else "loss"
    header = ["step", "samples", loss, *(f"{task} {title(name)}" for task, name in tasks.items())]
    return "<h3>Validations</h3>" + _table(header, lines)


def _of_markdown(table: str) -> str:
    """Return a Markdown table, whose cells hold no bars, as HTML."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return _table(cells[0], cells[2:])


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    head = row(header, "th") if any(header) else ""
    return f'<div class="wide"><table>{head}{"".join(row(line, "td") for line in lines)}</table></div>'


def _picture(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
