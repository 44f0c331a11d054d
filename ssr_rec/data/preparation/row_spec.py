"""Defines what a label is and which rows count for it: kinds, weights, missing labels, tasks of some rows alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import ibis
import numpy as np
from ibis.expr.types import BooleanValue, Column, NumericValue, Table
from pydantic import Field, field_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings
from ssr_rec.data.preparation.where import holds, parse_where
from ssr_rec.data.schema import NOT_OBSERVED

if TYPE_CHECKING:
    from ssr_rec.data.preparation.spec import TableSpec

MAX_WEIGHT = float(np.finfo(np.float32).max)
"""Weights and labels that are numbers are stored in float32."""


class TaskSpec(Settings):
    """Says what a label is, and on which rows it is learned and evaluated."""

    kind: Literal["binary", "number"] = Field("binary", description="binary: 0 or 1; number: any, such as seconds")
    where: str | None = Field(None, description="the rows that the task asks of, such as click = 1; None: all")
    missing: bool = Field(False, description="a null label, or NaN, is one that was not observed, and not a mistake")

    @field_validator("where")
    @classmethod
    def _readable(cls, where: str | None) -> str | None:
        if where is not None:
            parse_where(where)
        return where

    @property
    def conditions(self) -> list[str]:
        """Return the columns that ``where`` names."""
        return [condition.column for condition in parse_where(self.where)] if self.where is not None else []


def check_row_spec(spec: TableSpec) -> None:
    """Refuse tasks, weights and groups that do not fit the spec's columns.

    Raises:
        UserError: naming the entry and the fix.
    """
    if spec.together in {*spec.list_columns, *spec.row_vectors}:
        raise UserError(f"together: {spec.together!r} holds lists; the rows of a group have one value in common")
    for name, task in spec.tasks.items():
        if name not in spec.labels:
            raise UserError(f"tasks: {name!r} is not under labels, which has {', '.join(spec.labels)}")
        if task == TaskSpec():
            raise UserError(
                f"tasks.{name}: it says nothing; give where, missing: true or kind: number, or leave it out"
            )
        for column in task.conditions:
            if column in spec.list_columns:
                raise UserError(f"tasks.{name}.where: {column!r} holds lists; conditions are of single values")
            if column == name:
                raise UserError(f"tasks.{name}.where: a condition on the label itself would give it away")


def missing_labels(spec: TableSpec) -> list[str]:
    """Return the labels that are not observed for some rows."""
    tasks = spec.tasks
    return [label for label in spec.labels if label in tasks and (tasks[label].where or tasks[label].missing)]


def number_labels(spec: TableSpec) -> list[str]:
    """Return the labels that are numbers."""
    return [label for label in spec.labels if label in spec.tasks and spec.tasks[label].kind == "number"]


def check_of_label(rows: Table, name: str, spec: TableSpec) -> tuple[BooleanValue, str]:
    """Return which rows have a label that cannot be, and the rule."""
    task, label = spec.tasks.get(name, TaskSpec()), rows[name]
    if task.kind == "number":
        wrong, rule = _is_no_float32(label), f"a label of kind number must be finite and at most {MAX_WEIGHT:.3g}"
    else:
        wrong, rule = label.notnull() & ~label.isin([0.0, 1.0]), "a label must be 0 or 1"
    if task.missing:
        return wrong, f"{rule}, or null where it was not observed"
    if task.where is None:
        return wrong | label.isnull(), rule
    in_space = holds(rows, parse_where(task.where))
    return wrong | (in_space & label.isnull()), f"{rule} where {task.where}"


def _is_no_float32(label: Column) -> BooleanValue:
    """Return which rows have a number that is NaN, infinite or beyond float32; null is none of these."""
    # NaN is above everything to an engine, or nothing to it.
    odd: BooleanValue = label.isnan() | ~(label.abs() <= MAX_WEIGHT)
    return odd.fill_null(False)


def check_of_weight(rows: Table, name: str) -> tuple[BooleanValue, str]:
    """Return which rows have a weight that cannot be, and the rule."""
    weight = rows[name]
    # NaN is neither below nor above anything, or above everything, as the engine has it.
    wrong = weight.isnull() | weight.isnan() | (weight < 0) | (weight > MAX_WEIGHT)
    return wrong.fill_null(True), f"a row weight must be a number from 0 to {MAX_WEIGHT:.3g}"


def encoded_label(rows: Table, name: str, spec: TableSpec) -> Column:
    """Return a label as it is stored: int8, of numbers float32 and null where it is not observed."""
    label, task = rows[name], spec.tasks.get(name)
    if task is None:
        return label.cast("int8")
    seen = label.notnull()
    if task.where is not None:
        seen = seen & holds(rows, parse_where(task.where))
    if task.kind == "number":
        return seen.ifelse(label, ibis.null("float64")).cast("float32")
    return seen.ifelse(label, ibis.literal(float(NOT_OBSERVED))).cast("int8")


def counts_of_labels(rows: Table, spec: TableSpec) -> dict[str, NumericValue]:
    """Return the sums of ``count_splits``: positives as ``label<i>`` and, where not all rows count, ``counted<i>``.

    Labels that are numbers have the latter alone. The rows that count have a weight above 0 and an observed label.
    """
    if spec.weight is None and not spec.tasks:
        return {f"label{i}": rows[label].sum().cast("int64") for i, label in enumerate(spec.labels)}
    sums: dict[str, NumericValue] = {}
    for i, name in enumerate(spec.labels):
        stored = encoded_label(rows, name, spec)
        is_number = spec.tasks.get(name, TaskSpec()).kind == "number"
        counts = stored.notnull() if is_number else stored != NOT_OBSERVED
        if spec.weight is not None:
            # As it is stored: less than float32 can tell from 0 is 0.
            counts = counts & (rows[spec.weight].cast("float32") > 0)
        if not is_number:
            sums[f"label{i}"] = (counts & (stored == 1)).cast("int64").sum().cast("int64")
        sums[f"counted{i}"] = counts.cast("int64").sum().cast("int64")
    return sums


def check_counts(counts: dict[str, dict[str, int]], spec: TableSpec, by_days: bool) -> None:
    """Refuse a log in which a task has no row to train on or to be evaluated on; of days, in none of them.

    Args:
        counts: of ``count_splits``.
        by_days: whether the splits are days.

    Raises:
        UserError: naming the label, the split and the fix.
    """
    if spec.weight is None and not spec.tasks:
        return
    for i, name in enumerate(spec.labels):
        without = [split for split, found in counts.items() if not found[f"counted{i}"]]
        if not without or (by_days and len(without) < len(counts)):
            continue
        task = spec.tasks.get(name, TaskSpec())
        reasons = [f"tasks.{name}.where: {task.where}"] if task.where else []
        reasons += ["only nulls"] if task.missing else []
        reasons += [f"zero weights in column {spec.weight!r}"] if spec.weight else []
        where = "no day" if by_days else f"no row of the {without[0]} split"
        raise UserError(
            f"label {name!r}: {where} counts ({' or '.join(reasons)}); correct the spec or the log, or split otherwise"
        )


def check_negatives(spec: TableSpec, by_days: bool) -> None:
    """Refuse down-sampling where one shift of the logits would not undo it, or where rows that are left out count.

    Args:
        spec: with ``negatives`` below 1.
        by_days: whether the splits are days.

    Raises:
        UserError: says why.
    """
    problem = None
    if number_labels(spec):
        problem = f"label {number_labels(spec)[0]!r} is a number, of which no row is negative"
    elif len(spec.labels) > 1:
        problem = f"labels {', '.join(spec.labels)}: a row that is negative for one may be kept for another; name one"
    elif spec.together is not None:
        problem = f"together: {spec.together} keeps groups whole, and a group without some rows is another one"
    elif by_days:
        problem = "the splits are days, which are evaluated, too; split by time"
    elif spec.histories:
        problem = f"sequence {next(iter(spec.histories))!r} is made from the log and would miss the rows left out"
    if problem is not None:
        raise UserError(f"negatives={spec.negatives}: {problem}, or set negatives to 1")
