"""Says where a spec's lists have the weights of their items, in the log and among the staged columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssr_rec.common.errors import UserError
from ssr_rec.data.item_weights import is_mark, stored_weights

if TYPE_CHECKING:
    from ssr_rec.data.preparation.spec import TableSpec


def weight_columns(spec: TableSpec) -> list[str]:
    """Return the columns of the log that hold nothing but weights of items."""
    return [one.weights for one in spec.lists.values() if one.weights is not None and not is_mark(one.weights)]


def staged_weights(spec: TableSpec) -> dict[str, str]:
    """Return list column -> the staged column of its weights: its own, or one that is cut out of the items."""
    given = {name: one.weights for name, one in spec.lists.items() if one.weights is not None}
    return {name: stored_weights(name) if is_mark(weights) else weights for name, weights in given.items()}


def staged_columns(spec: TableSpec) -> list[str]:
    """Return the staged columns: those that are used, and weights cut out of items."""
    return list(dict.fromkeys([*spec.used, *staged_weights(spec).values()]))


def check_item_weight_specs(spec: TableSpec) -> None:
    """Refuse marks that a weight or a separator could hold.

    Raises:
        UserError: naming the list and the fix.
    """
    for name, one in spec.lists.items():
        if one.weights is None or not is_mark(one.weights):
            continue
        if any(letter in one.weights for letter in "+-. \t\n"):
            raise UserError(f"lists.{name}.weights: {one.weights!r} may be within a number; choose a mark such as ':'")
        if one.separator is not None and (one.separator in one.weights or one.weights in one.separator):
            raise UserError(f"lists.{name}.weights: {one.weights!r} and the separator are not apart; choose another")
