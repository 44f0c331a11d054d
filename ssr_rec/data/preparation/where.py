"""Parses the condition of a history's events, ``click = 1 and kind != 'ad'``, so that no database parses it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ibis
from ibis.expr.types import BooleanValue, Table

from ssr_rec.common.errors import UserError

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NAME = r'"[^"]+"|[^\W\d][\w.]*'
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
_TERM = re.compile(rf"({_NAME})\s*(!=|<=|>=|=|<|>)\s*({_NUMBER}|'[^']*')(?=\s|$)")
_AND = re.compile(r"\s+and\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """Names a column, a comparison and what it is compared with, a number or a text."""

    column: str
    sign: str
    value: int | float | str


def parse_where(text: str) -> list[Condition]:
    """Read conditions joined by ``and``.

    Raises:
        UserError: not of that form; the message shows the form.
    """
    text, found, start = text.strip(), [], 0
    while True:
        # From the left, since a text in quotes may hold " and ".
        match = _TERM.match(text, start)
        if match is None:
            raise _no_comparison(text[start:])
        found.append(_condition(*match.groups()))
        if match.end() == len(text):
            return found
        joined = _AND.match(text, match.end())
        if joined is None:
            raise _no_comparison(text[start:])
        start = joined.end()


def _condition(name: str, sign: str, value: str) -> Condition:
    if value.startswith("'"):
        if sign not in ("=", "!="):
            raise UserError(f"where: {f'{name} {sign} {value}'[:80]!r}: text is compared by = and != alone")
        return Condition(name.strip('"'), sign, value[1:-1])
    is_whole = value.lstrip("-").isdigit() and len(value) < 19  # within an int64
    return Condition(name.strip('"'), sign, int(value) if is_whole else float(value))


def _no_comparison(term: str) -> UserError:
    return UserError(
        f"where: {term[:80]!r} is no comparison such as click = 1 or kind != 'ad' (signs {', '.join(_OPERATORS)}; "
        "several are joined by and; a name of other letters stands in double quotes)"
    )


def holds(rows: Table, conditions: list[Condition]) -> BooleanValue:
    """Return whether all conditions hold; a missing value fulfils none.

    Raises:
        UserError: a column of another kind than what it is compared with.
    """
    result: BooleanValue = ibis.literal(True)
    for condition in conditions:
        column, value = rows[condition.column], condition.value
        kind = column.type()
        if isinstance(value, str):
            # Not of decimals, whose text would be 1.0.
            if not (kind.is_string() or kind.is_integer() or kind.is_boolean() or kind.is_date()):
                raise UserError(
                    f"where: column {condition.column!r} holds {kind}, which is not compared with the text {value!r}; "
                    "numbers stand without quotes"
                )
            column = column if kind.is_string() else column.cast("string")
        elif kind.is_string():
            number = column.try_cast("float64")
            # To an engine NaN, which a text may say too, is above every number.
            column = number.isnan().ifelse(ibis.null("float64"), number)
        elif not (kind.is_numeric() or kind.is_boolean()):
            raise UserError(f"where: column {condition.column!r} holds {kind}, which is compared with no number")
        elif not (kind.is_integer() and isinstance(value, int)):
            column = column.cast("float64")
        result = result & _OPERATORS[condition.sign](column, value).fill_null(False)
    return result
