"""Finds and checks measures of the user's own, which ``train.extra_metrics`` names by ``MODULE:FUNCTION``."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.common.own_classes import own_function
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.schema import SPLITS, Schema
from ssr_rec.metrics.number_metrics import OwnMetric, measured
from ssr_rec.metrics.split_metrics import is_exact
from ssr_rec.over_archs.contract import require

TAKEN = ("auc", "gauc", "logloss", "ne", "calibration", "rmse", "mae", "xauc", "mrr", "loss")
"""Names that a report has already; those that go on with ``gauc_``, ``auc_`` or ``ranking_`` as well."""


def own_metrics(paths: Sequence[str]) -> dict[str, OwnMetric]:
    """Return name of each function -> the function.

    Raises:
        UserError: no such function, one of other arguments, or a name that a report has already or that two of them
            have.
    """
    found: dict[str, OwnMetric] = {}
    for path in paths:
        name = path.rpartition(":")[2]
        if name in TAKEN or name.startswith(("auc_", "gauc_", "ranking_")) or name in found:
            raise UserError(f"train.extra_metrics: {path}: {name} is a measure already; give the function another name")
        function = own_function(path, "train.extra_metrics")
        if (problem := _arguments(function)) is not None:
            raise UserError(
                f"train.extra_metrics: {path}: {name} must take scores, labels, weights and groups: {problem}"
            )
        found[name] = function
    return found


def _arguments(function: OwnMetric) -> str | None:
    """Return why a function cannot be called as a measure; None: nothing is known against it."""
    try:
        signature(function).bind(*[None] * 4)
    except TypeError as error:
        return str(error)
    except ValueError:  # a compiled function may not tell
        return None
    return None


def check_own_metrics(config: TrainConfig, schema: Schema) -> None:
    """Refuse measures of one's own that are not there, and folds of which not all predictions are kept.

    Raises:
        UserError: names the fold and the fix.
    """
    wanted = {
        "train.monitor: xauc": config.monitor == "xauc",
        "train.extra_metrics": bool(own_metrics(config.extra_metrics)),
    }
    splits = (
        schema.splits if schema.days else {name: schema.splits[name] for name in SPLITS[1:] if name in schema.splits}
    )
    for what, is_wanted in wanted.items():
        for name, split in splits.items():
            if is_wanted and not is_exact(config.metrics, config.metrics_rows, split.num_rows):
                raise UserError(
                    f"{what} needs every prediction of split {name!r}, and train.metrics={config.metrics} keeps "
                    f"at most {config.metrics_rows:,} of its {split.num_rows:,} rows; set train.metrics=exact"
                )


def check_metric(path: str) -> None:
    """Call the measure at ``MODULE:FUNCTION`` on made-up rows and check what it must do.

    That is: a finite number of binary labels and of numbers, with and without groups, the same for the same rows, and
    arguments left as they are. In a test of your own: ``check_metric("my_package.my_module:my_metric")``.

    Raises:
        UserError: it cannot be imported, raises something or returns no number.
        AssertionError: it does not keep the contract; the message says which part.
    """
    ((name, function),) = own_metrics([path]).items()
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 5)
    for kind in ("binary", "number"):
        scores = rng.random(40)
        labels = (rng.random(40) < scores).astype(np.float64) if kind == "binary" else 100 * rng.random(40)
        weights = rng.integers(1, 4, 40).astype(np.float64)
        for given in ((scores, labels, weights, groups), (scores, labels, weights, None)):
            before = [None if part is None else part.copy() for part in given]
            found = measured(name, function, given)
            require(np.isfinite(found), f"of {kind} labels it is {found}")
            require(found == measured(name, function, given), f"the same {kind} rows give another number")
            pairs = zip(before, given, strict=True)
            same = all(a is None or b is None or np.array_equal(a, b) for a, b in pairs)
            require(same, "it changes its arguments")
