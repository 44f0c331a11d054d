"""Puts together all that is asked of a run's trained model, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.drift import drift
from ssr_rec.explaining.filters import filter_view
from ssr_rec.explaining.importance import MEASURES, Importance, column_groups, permutation_importance
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.explaining.slices import slices, worst_first
from ssr_rec.explaining.values import read_column
from ssr_rec.metrics.exact import of_task
from ssr_rec.metrics.number_metrics import evaluate_tasks
from ssr_rec.metrics.reliability import deciles, precision_recall
from ssr_rec.serving.trained_model import Restored, restore_model
from ssr_rec.training.datasets import choose_days


@dataclass(frozen=True)
class Question:
    """Says what to ask.

    Attributes:
        split: whose rows; None: test, or the last day of a run by days.
        rows: most rows of the split, for all but drift; None: all.
        importance_rows: most of these rows for the permutations.
        seeds: permutations of each column.
        groups: name -> columns that are also exchanged together.
        columns: to slice by; empty: every feature of the run with one value a row.
        min_rows: rows that earn a value a slice of its own.
        order: what the worst slice is, one of ``slices.ORDERS``.
    """

    split: str | None = None
    rows: int | None = None
    importance_rows: int = 20_000
    seeds: int = 3
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: Sequence[str] = ()
    min_rows: int = 200
    order: str = "auc"


def explain_run(
    run: Path, asked: Question, data: Path | None = None, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return the answers as JSON values.

    Args:
        run: the run folder.
        asked: what to ask.
        data: where the prepared dataset is now; None: where the run's config says.
        note: told what is being done.

    Returns:
        ``run``, ``dataset``, ``split``, ``rows``, ``tasks`` and ``numbers`` (measures of binary tasks and of others),
        ``importance``, ``filters`` (None of an over-arch without such), ``slices`` (task -> worst first), ``deciles``
        and ``precision_recall`` (by binary task) and ``drift``.

    Raises:
        UserError: no such run or dataset, or a split, group or column that there is not; before the model is scored.
    """
    restored = restore_model(run, data)
    model, schema, folder = restored.model, restored.schema, restored.data
    binary = _binary(schema)
    trained, split = _splits(restored, asked.split)
    groups = column_groups(schema, asked.groups)
    rows = SplitRows.read(folder, schema, split, asked.rows)
    whole = Schema.read(folder)
    names = list(asked.columns) or [f.name for f in schema.features if f.kind != "list"]
    columns = [read_column(folder, whole, split, name, rows.block.num_rows) for name in names]
    note(f"scoring {rows.block.num_rows:,} rows of {split}")
    logits, labels, weights = rows.logits(model, tied=True), rows.block.labels, rows.block.weights
    note("slices, calibration, drift")
    found: dict[str, list[dict[str, Any]]] = {}
    curves: dict[str, dict[str, Any]] = {}
    parts_of: dict[str, list[dict[str, Any]]] = {}
    for i, task in ((schema.labels.index(task), task) for task in binary):
        parts, of_rows = (logits[:, i], labels[:, i]), of_task(weights, i)
        of_columns = [slices(*parts, column, asked.min_rows, of_rows) for column in columns]
        found[task] = worst_first([one for entries in of_columns for one in entries], asked.order)
        curves[task] = _curve(precision_recall(*parts, weights=of_rows))
        parts_of[task] = deciles(*parts, weights=of_rows)
    measures = evaluate_tasks(logits, labels, rows.block.group_ids, schema.labels, restored.links, weights)
    answers = {
        **_names(run, restored),
        "split": split,
        "trained_on": trained,
        "rows": rows.block.num_rows,
        "order": asked.order,
        "min_rows": asked.min_rows,
        "tasks": {task: measures[task] for task in binary},
        "numbers": {task: measures[task] for task in schema.number_names},
        "filters": filter_view(model, rows),
        "slices": found,
        "deciles": parts_of,
        "precision_recall": curves,
        "drift": drift(folder, schema, split, trained),
    }
    some = SplitRows.read(folder, schema, split, min(asked.importance_rows, rows.block.num_rows))
    importance = permutation_importance(model, some, groups, range(asked.seeds), _progress(note))
    return {**answers, "importance": {"rows": some.block.num_rows, "groups": [_entry(one) for one in importance]}}


def _names(run: Path, restored: Restored) -> dict[str, Any]:
    """Return what the answers are about."""
    return {
        "run": run.name,
        "over_arch": restored.config.over_arch.label,
        "dataset": restored.schema.name,
        "dataset_id": restored.schema.dataset_id,
        "checkpoint": restored.checkpoint.name,
    }


def _binary(schema: Schema) -> list[str]:
    """Return the labels that are explained: those that are no numbers.

    Raises:
        UserError: there are none.
    """
    binary = [label for label in schema.labels if schema.number(label) is None]
    if not binary:
        raise UserError(f"the run predicts numbers alone ({', '.join(schema.labels)}), which are not explained")
    return binary


def _splits(restored: Restored, wanted: str | None) -> tuple[list[str], str]:
    """Return the splits that the run was trained on, and the one to ask about."""
    schema, days = restored.schema, restored.config.data.days
    if schema.days is None:
        split = wanted or "test"
        if split not in schema.splits:
            raise UserError(f"--split {split}: the dataset has {', '.join(schema.splits)}")
        return ["train"], split
    chosen = choose_days(days or "all", schema.days.names)
    split = wanted or schema.days.names[-1]
    if split not in schema.splits:
        raise UserError(f"--split {split}: the dataset has the days {', '.join(schema.days.names)}")
    # What came before a day is what its evaluation was trained on; of a later part of the model's life nothing is told.
    earlier = schema.days.names[: schema.days.names.index(split)]
    before = [day for day in chosen if day in earlier] or [day for day in chosen if day != split]
    return before, split


def _entry(one: Importance) -> dict[str, Any]:
    means = {
        measure: {
            task: {"mean": one.mean(measure, task), "spread": one.spread(measure, task)}
            for task in getattr(one, measure)
        }
        for measure in MEASURES
    }
    return {**asdict(one), **{f"{measure}_lost": value for measure, value in means.items()}}


def _curve(curve: Any) -> dict[str, Any]:
    return {
        "average_precision": curve.average_precision,
        "precision": np.round(curve.precision, 6).tolist(),
        "recall": np.round(curve.recall, 6).tolist(),
    }


def _progress(note: Callable[[str], None]) -> Callable[[int, int], None]:
    def tell(done: int, of: int) -> None:
        if done == of or done % max(1, of // 10) == 0:
            note(f"permutations: {done} of {of}")

    return tell
