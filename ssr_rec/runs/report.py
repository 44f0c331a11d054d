"""Defines ``report.json``, what a run ends with: the one definition by which it is written and read everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import first_problem
from ssr_rec.runs.folder import METRICS_FILE, read_metrics, write_json

REPORT_FILE = "report.json"

Measures = dict[str, dict[str, int | float | None]]
"""Task -> name -> value; None where a measure is not defined."""
Deciles = dict[str, list[dict[str, int | float]]]
"""Task -> of each tenth of the rows by rising prediction: rows, predicted and observed rate."""


class Figures(BaseModel):
    """Is the base of a report's parts: what versions before or after this one wrote besides is kept as it is."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, protected_namespaces=())


class OverArchFigures(Figures):
    """Describes the trained over-arch; besides these, what its ``statistics`` found."""

    name: str | None = Field(None, description="``over_arch.name`` of the config")
    kind: str = Field("", description="the label that people see")
    num_parameters: int | None = None
    flops_per_sample: int | float | None = None
    filters: dict[str, Any] = Field({}, description="of over-archs with filters: ``layers``, one entry per layer")
    interactions: dict[str, Any] | None = Field(None, description="of AutoFIS: stage, pairs and alphas")


class DatasetFigures(Figures):
    """Names the dataset that a run was trained on."""

    name: str | None = None
    dataset_id: str | None = None
    num_rows: int | None = Field(None, description="rows of one epoch")
    cut_groups: float | None = Field(None, description="about what share of the groups of together batches cut")


ByValue = dict[str, list[dict[str, Any]]]
"""Task -> of each value its ``value``, ``rows``, ``positives`` and measures."""


class ValueFigures(Figures):
    """Holds the measures for each value of a column, such as the domain; of the splits at the best step."""

    column: str
    validation: ByValue = {}
    test: ByValue = Field({}, description="a run by days has none: those of its days are theirs")


class DayFigures(Figures):
    """Holds the evaluation of a day before the run trained on it."""

    day: str
    tasks: Measures
    deciles: Deciles = Field({}, description="of the day's rows, as those of a test")
    by_value: ByValue | None = None


class Report(Figures):
    """Describes all that ``report.json`` holds; reports of older versions lack some of it."""

    name: str | None = Field(..., description="of the run folder")
    over_arch: OverArchFigures
    sequences: dict[str, dict[str, Any]] = Field(
        {}, description="sequence -> its encoder, its cost, its events' shares"
    )
    num_head_parameters: int | None = None
    num_embedding_parameters: int | None = None
    test: Measures = Field(..., description="of a run by days: the mean of the next days")
    validation: Measures = {}
    best_step: int | None = Field(None, description="after how many steps the kept weights were saved")
    ceiling: Measures = Field({}, description="what the best model could reach, where the log says so")
    samples_per_s: float | None = None
    data_wait: float | None = Field(None, description="share of the time")
    world_size: int | None = None
    steps: int | None = None
    epochs: int | float | None = None
    stopped_early: bool | None = None
    skipped_steps: int | None = None
    seconds: float | None = None
    warnings: list[str] = []
    seed: int | None = None
    dataset: DatasetFigures
    versions: dict[str, Any] = {}
    git_commit: str | None = None
    hardware: dict[str, Any] = {}
    failed_checkpoints: int | None = None
    metrics: str | None = Field(None, description="how the test was measured: exact or bounded")
    deciles: Deciles = Field(
        {}, description="task -> of each tenth of the test rows by rising prediction: rows, predicted and observed rate"
    )
    by_value: ValueFigures | None = Field(None, description="of a run with ``domain`` or ``train.metrics_by``")
    days: list[DayFigures] = Field([], description="of a run by days")
    warm_start: dict[str, Any] | None = Field(None, description="what was taken over")
    following: dict[str, Any] | None = Field(None, description="of a search: the over-arch to train next")

    def measure(self, part: Literal["test", "validation", "ceiling"], task: str, name: str) -> float | None:
        """Return a measure of a part, None where there is none or it is not defined."""
        measures: Measures = getattr(self, part)
        value = measures.get(task, {}).get(name)
        return None if value is None or math.isnan(value) else value

    @property
    def judged(self) -> Measures:
        """Return the figures that choose among runs: validation's, of a run by days the mean of the days.

        ``validation`` of a run by days is its best single day, which says more of the day than of the run.
        """
        return self.test if self.days else self.validation

    def values(self) -> dict[str, Any]:
        """Return what the file holds, as plain values."""
        return self.model_dump(exclude_unset=True)


class Run(NamedTuple):
    """Holds a finished run, read back; ``rows`` are those of metrics.jsonl."""

    report: Report
    rows: list[dict[str, Any]]


def write_report(folder: Path, report: Report) -> None:
    write_json(folder / REPORT_FILE, report.values())


def read_report(folder: str | Path) -> Report:
    """Return the report of a finished run.

    Raises:
        UserError: no such run, a run without a report (unfinished), or a file that is no report.
    """
    path = Path(folder) / REPORT_FILE
    if not path.parent.is_dir():
        raise UserError(f"{folder}: no such run folder")
    if not path.is_file():
        raise UserError(f"{folder}: no {REPORT_FILE}; the run has not finished, or this is not a run folder")
    try:
        return Report.model_validate(json.loads(path.read_text()))
    except (ValidationError, ValueError, RecursionError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else f"not JSON: {error}"
        raise UserError(f"{path}: {problem}; not the report of a training run: delete it and train again") from None


def read_run(folder: str | Path) -> Run:
    """Return report and history of a finished run; errors as in ``read_report`` and ``read_metrics``."""
    return Run(read_report(folder), read_metrics(Path(folder) / METRICS_FILE))
