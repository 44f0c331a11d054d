"""Reads and checks the weights of lists' items, as Ibis expressions, the same for every engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import ibis
from ibis.expr import datatypes as dt
from ibis.expr.types import ArrayColumn, Column, StringValue, Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.item_weights import MAX_WEIGHT, NUMBER, RULE, is_mark, stored_weights
from ssr_rec.data.preparation.engine import ROW
from ssr_rec.data.preparation.item_weight_spec import staged_weights
from ssr_rec.data.preparation.spec import ListColumn, TableSpec

if TYPE_CHECKING:
    from ssr_rec.data.preparation.sources import Log


def cut_out_weights(rows: Table, spec: TableSpec) -> dict[str, Column]:
    """Return the staged columns of weights that stand in the items of ``rows``, lists of float64.

    Raises:
        UserError: items that are no text.
    """
    found = {}
    for name, one in spec.lists.items():
        if one.weights is not None and is_mark(one.weights):
            items, mark = text_items(rows[name], name, one), re.escape(one.weights)
            found[stored_weights(name)] = items.map(
                lambda item, m=mark: _number(item.re_extract(rf"(?s)^.*{m}(.*)\z", 1))
            )
    return found


def without_weights(items: ArrayColumn, mark: str) -> ArrayColumn:
    """Return items up to the last mark, and those that have none as they are."""
    cut = re.escape(mark)
    return items.map(lambda item: item.contains(mark).ifelse(item.re_extract(rf"(?s)^(.*){cut}", 1), item))


def text_items(column: Column, name: str, settings: ListColumn) -> ArrayColumn:
    """Return a column of lists of text, cut at the separator where it is text.

    Raises:
        UserError: it is neither.
    """
    kind = column.type()
    if kind.is_string() and settings.separator is not None:
        return column.nullif("").split(settings.separator)
    if isinstance(kind, dt.Array) and kind.value_type.is_string():
        return column
    if kind.is_null() or kind.is_unknown():
        return ibis.null("array<string>")
    raise UserError(
        f"list column {name!r} holds {kind}; items with weights such as a{settings.weights}0.5 are text: give its "
        "separator, or the weights in a column of their own"
    )


def typed_weights(column: Column, name: str, settings: ListColumn) -> Column:
    """Return a column of weights as lists of float64, null where it is missing or no number.

    Raises:
        UserError: no lists of numbers, nor text with a separator.
    """
    kind = column.type()
    if kind.is_string():
        if settings.separator is None:
            raise UserError(f"column {name!r} of weights holds text; give its list a separator")
        return column.nullif("").split(settings.separator).map(_number)
    if not isinstance(kind, dt.Array) or not kind.value_type.is_numeric():
        raise UserError(f"column {name!r} of weights holds {kind}, not lists of numbers")
    return column.cast("array<float64>")


def _number(text: StringValue) -> Column:
    return text.re_search(rf"^{NUMBER}\z").ifelse(text, ibis.null("string")).try_cast("float64")


def check_item_weights(log: Log, rows: Table, spec: TableSpec) -> None:
    """Refuse a row with an item that has no weight, or one that cannot be.

    Raises:
        UserError: naming the first such row, its column, the item and its weight.
    """
    for name, weights in staged_weights(spec).items():
        items, of_items = (rows[column].length().fill_null(0) for column in (name, weights))
        odd = rows[weights].filter(lambda w: w.isnull() | w.isnan() | (w < 0) | (w > MAX_WEIGHT)).length().fill_null(0)
        wrong = (items != of_items) | (odd > 0)
        row = rows.aggregate(row=rows[ROW].min(where=wrong)).to_pyarrow()["row"][0].as_py()
        if row is not None:
            found = rows.filter(rows[ROW] == row).select(items=rows[name], weights=rows[weights]).to_pyarrow()
            raise UserError(f"{log.where(row)}: column {name!r}: {_problem(found.to_pylist()[0], weights)}")


def _problem(row: dict[str, Any], column: str) -> str:
    items, weights = row["items"] or [], row["weights"] or []
    if len(items) != len(weights):
        return f"{len(items)} items, and {column!r} has {len(weights)} weights; every item has one"
    for item, weight in zip(items, weights, strict=True):
        if weight is None or not 0 <= weight <= MAX_WEIGHT:
            shown = "missing or no number" if weight is None else weight
            return f"the weight of item {str(item)[:80]!r} is {shown}; {RULE}"
    raise AssertionError("a row without a wrong weight")
