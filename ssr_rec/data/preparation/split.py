"""Decides which split a row falls to, its place in the shuffle, and its group id, as Ibis expressions.

Nothing here is an engine's own but ``hex_number``: no other UDF, no backend SQL, no window over all rows. Row
arithmetic stays within int64.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa
from ibis.expr.types import IntegerValue, StringColumn, Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.engine import ROW
from ssr_rec.data.preparation.spec import DaySplit, TableSpec, TimeSplit
from ssr_rec.data.schema import GROUP_COLUMN, TOGETHER_COLUMN

SPLIT = "__split__"
"""0 train, 1 validation, 2 test; or which day, from 0."""
ORDER = "__order__"
"""Sorting by it shuffles; no two rows share it."""
TIME = "__time__"
"""What a split by time or days compares."""
MAX_DAYS = 4096
"""More are no days but moments; and each has a folder and a row of the report."""

DAY_NAME = r"[0-9A-Za-z][0-9A-Za-z_.+-]{0,63}"
"""A day names a folder."""
# Not `$`, which in some engines also stands before a last newline.
WHOLE_NUMBER = r"^-?[0-9]{1,19}\z"
DECIMAL = r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?\z"
YEAR_LAST = r"^[0-9]{1,2}[./-][0-9]{1,2}[./-][0-9]{4}([^0-9]|$)"
Numbers = bool | Literal["decimal"]
"""Of a column whose values may be numbers in text: True, whole ones throughout; decimal, any; False, it is text."""

FIRST = "__first__"
"""Of a group of rows, the ``ROW`` of its first one."""
MOST_TOGETHER = 2**31
"""Rows of a log whose groups can be kept together: the place in a group takes the low bits of ``ORDER``."""

_DRAW = "__draw__"
_LOW = "__low__"
_BITS = 31
_MASK = 2**_BITS - 1
# Odd multipliers with well spread bits: those of lowbias32 and murmur3, cut to 31 bits.
_MULTIPLIERS = (0x7FEB352D, 0x046CA68B, 0x05EBCA6B)
_SHIFTS = (16, 15, 13)


def with_order(rows: Table, seed: int, first_row: int = 0) -> Table:
    """Return ``rows`` with ``ORDER``: 31 pseudo-random bits of row number and seed, then the row number's high bits.

    The bits are a bijection of the row number modulo 2**31 (xor, shift and multiply, every product below 2**62), so
    there are no ties; rows 2**31 apart start from different salts.

    Args:
        first_row: how many rows of the dataset come before these.
    """
    number = rows[ROW] + first_row
    return _placed(rows, number, number >> _BITS, seed)


def first_rows(rows: Table, name: str, whole: Numbers) -> Table:
    """Return (``TOGETHER_COLUMN``, ``SPLIT``, ``FIRST``) of every group of rows, ``FIRST`` the first one's ``ROW``.

    Args:
        rows: they have ``ROW``; where they have ``SPLIT``, of days, the rows of a day are a group of their own, so that
            a day has the same order whether it is added later or not.
    """
    keyed = with_group(rows, name, whole, TOGETHER_COLUMN)
    keys = [column for column in (TOGETHER_COLUMN, SPLIT) if column in keyed.columns]
    return keyed.group_by(keys).agg(**{FIRST: keyed[ROW].min()})


def with_order_of_groups(rows: Table, firsts: Table, name: str, whole: Numbers, seed: int, first_row: int) -> Table:
    """Return ``rows`` with ``ORDER``: the bits that ``with_order`` gives the first row of a group, then the row in it.

    So groups are shuffled as rows are, there are no ties, and the rows of a group lie next to one another.

    Args:
        firsts: of ``first_rows``.
        name: the column that the groups are of.
        whole: as for ``with_group``.
        first_row: as for ``with_order``.
    """
    keyed = with_group(rows, name, whole, TOGETHER_COLUMN)
    there = firsts.rename({f"__{column}__": column for column in firsts.columns})
    keys = [column for column in firsts.columns if column != FIRST]
    joined = keyed.join(there, [keyed[column] == there[f"__{column}__"] for column in keys])
    first = joined[f"__{FIRST}__"]
    placed = _placed(joined, first + first_row, joined[ROW] - first, seed)
    return placed.select(*rows.columns, ORDER)


def _placed(rows: Table, number: IntegerValue, low: IntegerValue, seed: int) -> Table:
    """Return ``rows`` with ``ORDER``: 31 bits of ``number``, shuffled by the seed, then ``low``."""
    salt = (seed * 0x9E3779B1 + 0x2C1B3C6D) & _MASK
    rows = rows.mutate(**{ORDER: (number ^ ((number >> _BITS) * _MULTIPLIERS[0] + salt)) & _MASK, _LOW: low})
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=True):
        # Each round is a column of its own: as one nested expression the text doubles with every xor.
        rows = rows.mutate(**{ORDER: ((rows[ORDER] ^ (rows[ORDER] >> shift)) * multiplier) & _MASK})
    return rows.mutate(**{ORDER: (rows[ORDER] ^ (rows[ORDER] >> 16)) * 2**_BITS + rows[_LOW]}).drop(_LOW)


def with_split(rows: Table, spec: TableSpec) -> Table:
    """Return ``rows``, which have ``ORDER`` (random split) or ``TIME`` (time split), with ``SPLIT``; not for days.

    A random split cuts the shuffled order at its ratios: each row falls to a split with its ratio as probability,
    and the order within a split is still shuffled.

    Raises:
        UserError: the boundaries of a time split are not of the column's kind.
    """
    rule = spec.split
    assert not isinstance(rule, DaySplit)
    if isinstance(rule, TimeSplit):
        cut, bounds = rows[TIME], _moments(rows, rule)
    else:
        cut = rows[ORDER]
        bounds = [round(share * 2**_BITS) * 2**_BITS for share in (rule.ratios[0], rule.ratios[0] + rule.ratios[1])]
    split = ibis.cases((cut < bounds[0], 0), (cut < bounds[1], 1), else_=2)
    return rows.mutate(**{SPLIT: split.cast("int8")})


def without_some_negatives(rows: Table, label: str, share: float) -> Table:
    """Return ``rows``, which have ``ORDER`` and ``SPLIT``, without ``1 - share`` of the negative ones of training.

    Which ones, the row's place in the shuffle decides: of any engine, file or thread they are the same. Its bits are
    mixed once more, as a random split has already chosen by them.
    """
    place = rows[ORDER] >> _BITS
    rows = rows.mutate(**{_DRAW: ((place ^ (place >> _SHIFTS[0])) * _MULTIPLIERS[2]) & _MASK})
    for shift, multiplier in zip(_SHIFTS[1:], _MULTIPLIERS[:2], strict=True):
        rows = rows.mutate(**{_DRAW: ((rows[_DRAW] ^ (rows[_DRAW] >> shift)) * multiplier) & _MASK})
    drawn = (rows[_DRAW] ^ (rows[_DRAW] >> 16)) < round(share * 2**_BITS)
    return rows.filter((rows[SPLIT] != 0) | (rows[label] == 1) | drawn).drop(_DRAW)


def _moments(rows: Table, rule: TimeSplit) -> list[Any]:
    kind = rows[TIME].type()
    moments = []
    for moment in rule.boundaries or []:
        if kind.is_floating():
            try:
                moments.append(ibis.literal(float(moment), kind))
            except ValueError:
                raise UserError(f"time column {rule.column!r} holds numbers; the boundary {moment!r} is none") from None
            continue
        if not kind.is_temporal() and kind.is_string() != isinstance(moment, str):
            raise UserError(f"time column {rule.column!r} holds {kind}; the boundary {moment!r} is not of that kind")
        try:
            moments.append(ibis.literal(moment, kind))
        except (TypeError, ValueError):
            raise UserError(f"time column {rule.column!r}: the boundary {moment!r} is not a {kind}") from None
    return moments


def whole_numbers(rows: Table, name: str, is_time: bool = False) -> Numbers:
    """Return whether a column without nulls holds numbers, as such or as text throughout.

    Args:
        is_time: its order must be that of time.

    Raises:
        UserError: times that are dates as text whose year comes last, which do not sort by time.
    """
    column = rows[name]
    if not column.type().is_string():
        return bool(column.type().is_integer())
    # Nineteen digits may be more than an int64 has.
    whole = column.re_search(WHOLE_NUMBER) & column.try_cast("int64").notnull()
    wanted = {"whole": whole.all(), "decimal": column.re_search(DECIMAL).all()}
    if is_time:
        wanted["year_last"] = column.min(where=column.re_search(YEAR_LAST))
    found = rows.aggregate(**wanted).to_pyarrow()
    if is_time and (text := found["year_last"][0].as_py()) is not None:
        raise UserError(
            f"time column {name!r} holds {text[:80]!r}, and such text does not sort by time; write dates as 2026-09-30"
        )
    if found["whole"][0].as_py():
        return True
    return "decimal" if found["decimal"][0].as_py() else False


def with_time(rows: Table, name: str, whole: Numbers) -> Table:
    """Return ``rows`` with ``TIME``: text that is numbers throughout compares as numbers, all else as it is."""
    if whole == "decimal":
        return rows.mutate(**{TIME: rows[name].cast("float64")})
    return rows.mutate(**{TIME: rows[name].cast("int64") if whole else rows[name]})


def with_day(rows: Table, name: str, whole: Numbers) -> Table:
    """Return ``rows`` with ``TIME`` as in ``with_time``, moments cut to their dates."""
    if rows[name].type().is_timestamp():
        return rows.mutate(**{TIME: rows[name].date()})
    return with_time(rows, name, whole)


def distinct_days(rows: Table, column: str) -> pa.Table:
    """Return (day, index, name) of the values of ``TIME`` in rising order.

    Raises:
        UserError: a value that does not name a day, or too many of them.
    """
    found = rows.select(day=rows[TIME]).distinct().limit(MAX_DAYS + 1).to_pyarrow().sort_by("day")
    if len(found) > MAX_DAYS:
        raise UserError(f"column {column!r} has more than {MAX_DAYS} distinct values; a split by days needs days")
    names = [str(day) for day in found["day"].to_pylist()]
    for name in names:
        if re.fullmatch(DAY_NAME, name) is None:
            raise UserError(f"column {column!r} holds {name[:80]!r}, which names no day; cut it to days, as 2024-05-06")
    return found.append_column("index", pa.array(range(len(names)), pa.int64())).append_column("name", pa.array(names))


def resolved(rows: Table, rule: TimeSplit) -> TimeSplit:
    """Return the rule with the boundaries that its ratios come to: a moment is never divided between two splits."""
    if rule.ratios is None:
        return rule
    counted = rows.group_by(TIME).agg(count=lambda t: t.count()).to_pyarrow().sort_by(TIME)
    count = counted["count"].to_numpy()
    wanted = np.cumsum(rule.ratios)[:2] * count.sum()
    firsts = np.searchsorted(np.cumsum(count) - count, wanted)
    if firsts[0] == firsts[1] or firsts[1] == len(count):
        raise UserError(f"time column {rule.column!r} has too few distinct values to split by ratios; give boundaries")
    moments = [counted[TIME][int(first)].as_py() for first in firsts]
    boundaries = [moment if isinstance(moment, int) else str(moment) for moment in moments]
    return TimeSplit(column=rule.column, boundaries=boundaries)


@ibis.udf.scalar.builtin
def hex_number(digits: str) -> int:  # type: ignore[empty-body]
    """Return the number that at most 15 hexadecimal digits are; each engine defines it when it connects."""


def digits_of(digest: StringColumn, first: int, count: int) -> IntegerValue:
    """Return ``count`` (at most 15) hexadecimal digits of a digest from position ``first`` as a number."""
    number: IntegerValue = hex_number(digest.substr(first, count))
    return number


def with_group(rows: Table, name: str, whole: Numbers, stored: str = GROUP_COLUMN) -> Table:
    """Return ``rows`` with a column ``stored``: the number itself, else the first 60 bits of the md5 of its text."""
    if whole is True:
        return rows.mutate(**{stored: rows[name].cast("int64")})
    return rows.mutate(**{stored: digits_of(rows[name].cast("string").hexdigest("md5"), 0, 15)})
