"""Takes the labels of rows, of any two values each, as 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, column_or_1d

from ssr_rec.common.errors import UserError


@dataclass(frozen=True)
class Labels:
    """Holds the labels of rows.

    Attributes:
        values: (B, T), the columns named as the labels.
        classes: of each label its two values; the second counts as 1.
    """

    values: pd.DataFrame
    classes: list[np.ndarray]

    @property
    def names(self) -> list[str]:
        return list(self.values.columns)

    def encoded(self) -> dict[str, np.ndarray]:
        """Return label -> 0 and 1 (B,) int8."""
        pairs = zip(self.names, self.classes, strict=True)
        return {name: (self.values[name].to_numpy() == of[1]).astype(np.int8) for name, of in pairs}


def refuse_numbers(names: Sequence[str]) -> None:
    """Refuse labels that are numbers, which have no classes.

    Raises:
        UserError: names them and what predicts numbers.
    """
    if names:
        raise UserError(
            f"label {names[0]!r} is a number, and CTRClassifier predicts classes; train by ssr_rec/train.py and score "
            "with ssr_rec.serving"
        )


def labels_of(X: Any, y: Any, names: str | Sequence[str] | None, classes: Any = None) -> Labels:
    """Return the labels ``y``, or the columns ``names`` of ``X``.

    Args:
        classes: as ``fit`` found them; None: find them.

    Raises:
        UserError: no labels, both kinds of them, a label that is a feature, too, a missing value, or not two classes.
    """
    if y is not None and names is not None:
        raise UserError("y and labels both give the labels; give y, or name the columns of X that hold them")
    if y is None:
        values = _columns(X, names)
    elif isinstance(y, pd.DataFrame):
        values = y
    else:
        values = _of_arrays(y)
    if len(values) != len(values.dropna()):
        row = int(np.argmax(values.isna().any(axis=1).to_numpy()))
        raise UserError(f"row {row}: a label is missing (NaN); leave out such rows")
    check_consistent_length(X, values)
    if classes is None and y is not None:
        for name in {*values} & {*getattr(X, "columns", ())}:
            raise UserError(
                f"y and the frame both have a column {name!r}; drop it from the frame, or give labels={name!r} in "
                "place of y"
            )
    if classes is None:
        classes = [_classes(values[name], name) for name in values]
    elif isinstance(classes, np.ndarray):
        classes = [classes]
    for name, of in zip(values, classes, strict=True):
        odd = ~values[name].isin(of).to_numpy()
        if odd.any():
            row = int(odd.argmax())
            raise UserError(
                f"row {row}: label {name!r} is {values[name].tolist()[row]!r}; the classes are {of.tolist()}"
            )
    return Labels(values, list(classes))


def _columns(X: Any, names: str | Sequence[str] | None) -> pd.DataFrame:
    if names is None:
        raise UserError(
            "CTRClassifier requires y to be passed, but the target y is None; give y, or name the columns of X that "
            "hold labels: labels='click'"
        )
    wanted = [names] if isinstance(names, str) else list(names)
    frame = X.to_pandas() if hasattr(X, "to_pandas") else X
    if not isinstance(frame, pd.DataFrame):
        raise UserError(f"labels={names!r} names columns, and X is {type(X).__name__}; give a DataFrame, or y")
    for name in wanted:
        if name not in frame.columns:
            raise UserError(f"labels: no column {name!r}; the frame has {', '.join(map(str, frame.columns[:40]))}")
    return frame[wanted]


def _of_arrays(y: Any) -> pd.DataFrame:
    values = np.asarray(y)
    if values.ndim == 2 and values.shape[1] > 1:
        return pd.DataFrame(values, columns=[f"y{task}" for task in range(values.shape[1])])
    name = getattr(y, "name", None)
    return pd.DataFrame({"y" if name is None else str(name): column_or_1d(values, warn=True)})


def _classes(values: pd.Series, name: str) -> np.ndarray:
    array = values.to_numpy()
    check_classification_targets(array)
    classes = np.unique(array)
    if len(classes) > 2:
        raise UserError(
            f"label {name!r}: Only binary classification is supported. The type of the target is "
            f"{type_of_target(array)}, with {len(classes)} classes; make one label of two values of each class"
        )
    if len(classes) < 2:
        raise UserError(f"label {name!r} has one class alone, {classes.tolist()}; two are needed")
    return classes
