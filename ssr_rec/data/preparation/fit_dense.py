"""Fits the scales and quantile bins of dense columns on training rows, with the same arithmetic for every engine."""

from __future__ import annotations

import math

import ibis
import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.data.dense import DenseColumn, Scale, log_or_same, scaled
from ssr_rec.data.preparation.fit import SplitPlan
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
    transformed = log_or_same(numbers, scale)
    try:
        # Sums that are rounded once have no order.
        mean = math.fsum(transformed) / len(numbers)
        std = math.sqrt(math.fsum((transformed - mean) ** 2) / len(numbers))
    except OverflowError:
        std = mean = math.inf
    if not math.isfinite(std):
        raise UserError(
            f"dense column {name!r} has numbers from {numbers.min():g} to {numbers.max():g}, too far apart for a "
            "standard deviation; give it the scale log, or name it under numeric"
        )
    column = DenseColumn(name=name, scale=scale, mean=mean, std=std or 1.0, edges=[0.0, 1.0])
    ordered = np.sort(scaled(numbers, column)).astype(np.float64)
    edges = np.unique(ordered[np.arange(bins + 1) * (len(ordered) - 1) // bins]).tolist()
    return column.model_copy(update={"edges": edges if len(edges) > 1 else [edges[0], edges[0] + 1.0]})
