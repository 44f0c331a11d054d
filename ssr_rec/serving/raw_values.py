"""Says what a raw value counts as: its text, its number, its items, or missing; and refuses what is none of them.

A value counts by its text, as in the preparation: 7 is ``7``, True is ``true``, a date is ISO. pandas makes integers
with gaps floats, so a whole float is that integer. None, NaN, NA and NaT are missing. Most columns never come here:
``id_columns.py`` has a short way for those of one common type.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ssr_rec.common.errors import UserError

Form = TypeVar("Form")
MAX_EXACT = 2**53
"""Beyond it a float does not say which integer it was."""
MAX_INTEGER = 2**127


def text_of(value: Any) -> str | None:
    """Return the text that a vocabulary or hash knows a value by; None for missing.

    Raises:
        UserError: a value with no one text form.
    """
    kind = type(value)
    if kind is str:
        return value
    if kind is bool or isinstance(value, np.bool_):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        whole = int(value)
        if not -MAX_INTEGER <= whole < MAX_INTEGER:
            raise UserError("holds an integer beyond 128 bits")
        return str(whole)
    if is_missing(value):
        return None
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not (abs(number) <= MAX_EXACT and number.is_integer()):
            raise UserError(f"holds {shown(value)}; a category is text, a whole number, a boolean or a date")
        return str(int(number))
    if isinstance(value, str):
        return str(value)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    raise UserError(f"holds {shown(value)}; a category is text, a whole number, a boolean or a date")


def number_of(value: Any) -> float | None:
    """Return a number as float64; None for missing.

    Raises:
        UserError: no number, or one that is not finite.
    """
    if is_missing(value):
        return None
    if not isinstance(value, (int, float, np.number, np.bool_)) or isinstance(value, np.complexfloating):
        raise UserError(f"holds {shown(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"holds {shown(value)}; a number must be finite, and missing is None or NaN")
    return number


def is_missing(value: Any) -> bool:
    return (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, (float, np.floating)) and value != value)
    )


def items_of(value: Any, separator: str | None) -> Sequence[Any]:
    """Return the items of a list feature's value; missing is empty.

    Raises:
        UserError: not a list, nor text that the preparation would cut into one.
    """
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if is_missing(value):
        return ()
    if isinstance(value, str) and separator is not None:
        return value.split(separator) if value else ()
    wanted = f"a list, or text with {separator!r} between the items" if separator else "a list"
    raise UserError(f"holds {shown(value)}, not {wanted}")


def shown(value: Any) -> str:
    """Return a value for a message, shortened; its type where it is none that people write."""
    if isinstance(value, (str, bytes)):
        return f"the {type(value).__name__} {value[:40]!r}{'...' if len(value) > 40 else ''}"
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        return "an integer beyond 128 bits"
    if isinstance(value, (int, float, np.number, np.bool_)):
        return f"the {type(value).__name__} {value}"
    return f"a {type(value).__name__}"


def each(values: Sequence[Any], form: Callable[[Any], Form]) -> list[Form]:
    """Return the form of every value.

    Raises:
        WrongValue: a value of the wrong type.
    """
    try:
        return [form(value) for value in values]
    except ValueError:
        for row, value in enumerate(values):
            try:
                form(value)
            except ValueError as error:
                raise WrongValue(row, str(error)) from None
        raise


class WrongValue(UserError):
    """Is raised for a value of the wrong type, with its row and the place of its column among others."""

    def __init__(self, row: int, problem: str, column: int = 0) -> None:
        super().__init__(f"row {row} {problem}")
        self.row, self.problem, self.column = row, problem, column
