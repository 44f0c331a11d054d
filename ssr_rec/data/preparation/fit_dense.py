"""Fits the scales of dense columns and of number labels on training rows, with the same arithmetic for every engine."""

from __future__ import annotations

import math

import ibis
import numpy as np
from ibis.expr.types import Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.dense import DenseColumn, Scale, log_or_same, scaled
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.preparation.fit import SplitPlan
from ssr_rec.data.preparation.row_spec import encoded_label, number_labels
from ssr_rec.data.preparation.split import ORDER, SPLIT

FITTED_ROWS = 2**18
"""The first training rows of the shuffle, so many at most, which fit the memory of one process whatever the log."""


def fit_dense(plan: SplitPlan) -> list[DenseColumn]:
    """Return the scales and bins of the spec's dense columns, fitted on its training rows, or on the first days.

    An engine's own sum depends on how many threads share it. So the rows come here: ``FITTED_ROWS`` of them tell a mean
    to a 500th of the standard deviation.

    Raises:
        UserError: numbers so far apart that their standard deviation is not finite.
    """
    spec, names = plan.spec, list(plan.spec.dense)
    if not names:
        return []
    rows = plan.rows(names)
    train = rows.filter(rows[SPLIT] < plan.fitted)
    found = train.order_by(ibis.asc(ORDER)).limit(FITTED_ROWS).select(*names).to_pyarrow()
    columns = []
    for name in names:
        numbers = found[name].to_numpy().astype(np.float64)
        columns.append(_fitted(name, numbers[~np.isnan(numbers)], spec.dense[name], spec.dense_bins))
    return columns


def _fitted(name: str, numbers: np.ndarray, scale: Scale, bins: int) -> DenseColumn:
    """Return the column of ``numbers`` (n,) float64, none of which is missing."""
    if not len(numbers):
        return DenseColumn(name=name, scale=scale, mean=0.0, std=1.0, edges=[0.0, 1.0])
    mean, std = _moments(log_or_same(numbers, scale))
    if not math.isfinite(std):
        raise UserError(
            f"dense column {name!r} has numbers from {numbers.min():g} to {numbers.max():g}, too far apart for a "
            "standard deviation; give it the scale log, or name it under numeric"
        )
    column = DenseColumn(name=name, scale=scale, mean=mean, std=std or 1.0, edges=[0.0, 1.0])
    ordered = np.sort(scaled(numbers, column)).astype(np.float64)
    edges = np.unique(ordered[np.arange(bins + 1) * (len(ordered) - 1) // bins]).tolist()
    return column.model_copy(update={"edges": edges if len(edges) > 1 else [edges[0], edges[0] + 1.0]})


def _moments(numbers: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of numbers (n,) float64; infinite where they are too far apart."""
    if (numbers == numbers[0]).all():
        return float(numbers[0]), 0.0  # their sum over n may be rounded to a neighbour, from which all would differ
    try:
        # Sums that are rounded once have no order.
        mean = math.fsum(numbers) / len(numbers)
        return mean, math.sqrt(math.fsum((numbers - mean) ** 2) / len(numbers))
    except OverflowError:
        return math.inf, math.inf


def fit_numbers(plan: SplitPlan) -> list[NumberLabel]:
    """Return what a schema says of the spec's labels that are numbers, fitted as dense columns are.

    Raises:
        UserError: a label that no row of the fitted splits has.
    """
    found = []
    for name, (low, high) in ranges_of_numbers(plan).items():
        rows = _observed(plan, name)
        train = rows.filter((rows[SPLIT] < plan.fitted) & rows[name].notnull())
        numbers = train.order_by(ibis.asc(ORDER)).limit(FITTED_ROWS).select(name).to_pyarrow()[name].to_numpy()
        if not len(numbers) or low is None or high is None:
            raise UserError(f"label {name!r}: no row to train on has it; correct the spec or log, or split otherwise")
        mean, std = _moments(numbers)
        if not math.isfinite(std):
            raise UserError(
                f"label {name!r} goes from {low:g} to {high:g}, too far for a standard deviation; rescale it"
            )
        log_mean, log_std = _moments(log_or_same(numbers, "log"))
        logs = {"log_mean": log_mean, "log_std": log_std or 1.0} if low >= 0 else {}
        found.append(NumberLabel(name=name, mean=mean, std=std or 1.0, low=low, high=high, **logs))
    return found


def ranges_of_numbers(plan: SplitPlan) -> dict[str, tuple[float | None, float | None]]:
    """Return label that is a number -> the least and greatest of all rows; None where none is observed."""
    found = {}
    for name in number_labels(plan.spec):
        rows = _observed(plan, name)
        ends = rows.aggregate(low=rows[name].min(), high=rows[name].max()).to_pyarrow().to_pylist()[0]
        found[name] = ends["low"], ends["high"]
    return found


def _observed(plan: SplitPlan, name: str) -> Table:
    """Return a label as shards have it, in float64, with ``SPLIT`` and ``ORDER``."""
    rows = plan.rows([*dict.fromkeys([name, *plan.spec.tasks[name].conditions])])
    return rows.select(SPLIT, ORDER, **{name: encoded_label(rows, name, plan.spec).cast("float64")})
