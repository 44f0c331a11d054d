"""Makes frames of what a user gives as rows, and says which rows are not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.validation import validate_data

from ssr_rec.common.errors import UserError
from ssr_rec.estimator.labels import Labels

SPLIT_ROWS = 1000
"""Of a smaller frame exact shares of every class are held out; a larger one is split as the command line does it."""
HELD_OUT = 0.2


def frame_of(estimator: Any, X: Any, reset: bool, without: list[str]) -> pd.DataFrame:
    """Return rows as a DataFrame whose columns are named by text; no column of a DataFrame is copied.

    Args:
        reset: they are those of ``fit``, and say which columns the estimator knows.
        without: columns to leave out, where they are there.

    Raises:
        UserError: a frame without rows or columns, or with a column twice; ValueError: what scikit-learn refuses.
    """
    frame = X.to_pandas() if hasattr(X, "to_pandas") else X
    if not isinstance(frame, pd.DataFrame):
        array = validate_data(estimator, X, dtype=None, ensure_all_finite="allow-nan", reset=reset)
        frame = pd.DataFrame(array, columns=names_of(estimator, array.shape[1]))
        return frame.infer_objects() if array.dtype == object else frame
    frame = frame.drop(columns=[name for name in without if name in frame.columns])
    if reset:
        validate_data(estimator, frame, skip_check_array=True, reset=True)
        if not all(frame.shape):
            raise UserError(f"the frame has {frame.shape[0]} row(s) and {frame.shape[1]} feature(s); give some")
    if not all(isinstance(name, str) for name in frame.columns):
        # As those of an array are called: the names of tables decide their first weights.
        frame = frame.set_axis([name if isinstance(name, str) else f"x{name}" for name in frame.columns], axis=1)
    for name, count in frame.columns.value_counts().items():
        if count > 1:
            raise UserError(f"column {name!r} is there {count} times; rename one of them")
    return frame


def names_of(estimator: Any, columns: int) -> list[str]:
    """Return the names of an array's columns."""
    return list(getattr(estimator, "feature_names_in_", [f"x{number}" for number in range(columns)]))


def split_of(labels: Labels, validation: Any, spec: Mapping[str, Any], seed: int) -> np.ndarray | None:
    """Return 0 for each of ``fit``'s rows that is trained on, 1 to validate, 2 to test, (B,); None: the spec splits.

    Raises:
        UserError: a share that is none, too few rows, two rules, or one that divides groups that are kept together.
    """
    rows = len(labels.values)
    if rows < 3:
        raise UserError(f"n_samples={rows}: at least 3 rows are needed, to train, to validate and to test")
    together = spec.get("together")
    if validation is None:
        if "split" in spec or rows >= SPLIT_ROWS or together is not None:
            return None
        validation = HELD_OUT
    elif "split" in spec:
        raise UserError("validation and split both say which rows are not trained on; give one")
    elif together is not None and not (isinstance(validation, (tuple, list)) and len(validation) == 2):
        raise UserError(
            f"validation would divide the groups of together={together!r} row by row; give two frames, to validate and "
            "to test, or split={'type': 'random', 'ratios': [8, 1, 1]}, which keeps them whole"
        )
    if not isinstance(validation, float):
        return np.zeros(rows, dtype=np.int64)
    if not 0 < validation < 1:
        raise UserError(f"validation={validation} is not a share of the rows; give one between 0 and 1")
    order = np.random.default_rng(seed).permutation(rows)
    # Every so many rows of those in order of their classes: each class gives its share.
    classes = np.stack([values[order] for values in labels.encoded().values()])
    order = order[np.lexsort(classes)]
    share = max(validation, 2 / rows)
    taken = np.diff(np.floor(np.arange(rows + 1) * share + 1e-9)) > 0
    split = np.zeros(rows, dtype=np.int64)
    split[order[taken]] = 1 + np.arange(taken.sum()) % 2
    return split


def frames_held_out(validation: Any) -> list[tuple[pd.DataFrame, np.ndarray]]:
    """Return the frames of ``validation`` and their splits: of one frame each second row to test, or of two.

    Raises:
        UserError: no frames.
    """
    frames = list(validation) if isinstance(validation, (tuple, list)) else [validation]
    frames = [one.to_pandas() if hasattr(one, "to_pandas") else one for one in frames]
    if len(frames) not in (1, 2) or not all(isinstance(one, pd.DataFrame) for one in frames):
        raise UserError(
            f"validation is {type(validation).__name__}; give a share such as .2, a frame, or two frames, to validate "
            "and to test"
        )
    if len(frames) == 1:
        return [(frames[0], 1 + np.arange(len(frames[0])) % 2)]
    return [(one, np.full(len(one), split)) for split, one in enumerate(frames, start=1)]


def new_name(name: str, frame: pd.DataFrame) -> str:
    """Return a name for a further column, which the frame does not have."""
    while name in frame.columns:
        name += "_"
    return name


def weights_of(sample_weight: Any, labels: Labels, spec: Mapping[str, Any]) -> np.ndarray | None:
    """Return ``sample_weight`` as an array (B,) float64, or None.

    Raises:
        UserError: not a weight for each row, an odd one, none for a class, or weights in a column of the frame, too.
    """
    rows = len(labels.values)
    if sample_weight is None:
        return None
    if spec.get("weight") is not None:
        raise UserError(f"sample_weight and weight={spec['weight']!r} both give the weights; give one")
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (rows,):
        raise UserError(f"sample_weight has shape {weights.shape}; give one weight for each of the {rows} rows")
    if (odd := ~(np.isfinite(weights) & (weights >= 0))).any():
        row = int(odd.argmax())
        raise UserError(f"row {row}: sample_weight is {weights[row]}; a weight must be finite and not negative")
    if not weights.any():
        raise UserError("sample_weight is zero for every row; leave it out, or give some row a weight")
    for name, values in labels.encoded().items():
        if len(np.unique(values[weights > 0])) < 2:
            raise UserError(f"label {name!r} has one class alone among the rows of a weight above 0; two are needed")
    return weights
