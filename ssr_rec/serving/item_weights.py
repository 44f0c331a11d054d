"""Reads the weights of lists' items in raw rows, as ``preparation/item_weights.py`` does in a log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import Feature
from ssr_rec.data.item_weights import NUMBER, WrongWeight, checked_weights, cut_weight, is_mark
from ssr_rec.serving.id_columns import Column, numbers_of
from ssr_rec.serving.raw_values import WrongValue, shown

Raw: TypeAlias = Mapping[str, tuple[np.ndarray, np.ndarray]]


class ItemWeights:
    """Knows where the weights of lists' items are in raw rows.

    Attributes:
        marks: list feature -> what stands between its items and their weights.
        of_columns: list feature -> the column of its weights.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        self.lists = [feature for feature in features if feature.kind == "list"]
        given = {feature.name: feature.weights for feature in self.lists if feature.weights is not None}
        self.marks = {name: weights for name, weights in given.items() if is_mark(weights)}
        self.of_columns = {name: weights for name, weights in given.items() if name not in self.marks}

    @property
    def has_any(self) -> bool:
        return bool(self.marks or self.of_columns)

    @property
    def columns(self) -> list[str]:
        return list(self.of_columns.values())

    def cut(self, name: str, items: Column, offsets: np.ndarray) -> tuple[Column, np.ndarray]:
        """Return the values of items such as ``id:0.5``, and their weights (n,) float64.

        Raises:
            WrongValue: an item that is no text, or missing, by its row.
        """
        values, weights, mark = [], np.empty(len(items)), self.marks[name]
        listed = items.to_pylist() if isinstance(items, pa.Array) else items
        for at, item in enumerate(listed):
            if not isinstance(item, str):
                raise WrongValue(_row_of(at, offsets), f"holds {_shown(item)}; its items are text such as a{mark}0.5")
            value, weights[at] = cut_weight(item, mark)
            values.append(value)
        return values, weights

    def numbers(self, name: str, items: Column, offsets: np.ndarray) -> np.ndarray:
        """Return weights (n,) float64, NaN where missing; text as a separator cut it is read, too.

        Raises:
            WrongValue: what is no number, by its row.
        """
        if isinstance(items, pa.Array) and (pa.types.is_string(items.type) or pa.types.is_large_string(items.type)):
            items = items.to_pylist()
        if not isinstance(items, pa.Array):
            items = [_number(item) for item in items]
        try:
            return numbers_of(items, finite=False)
        except WrongValue as error:
            problem = f"{error.problem} among the weights {self.of_columns[name]!r}"
            raise WrongValue(_row_of(error.row, offsets), problem) from None

    def checked(self, raw: Raw, first_row: int) -> list[np.ndarray | None] | None:
        """Return the weights of each list feature as ``Encoded`` has them.

        Args:
            raw: list feature -> weights (n,) float64 and where each row's begin (B + 1,).

        Raises:
            UserError: a weight that cannot be, with its row.
        """
        if not raw:
            return None
        found: list[np.ndarray | None] = []
        for feature in self.lists:
            try:
                found.append(checked_weights(*raw[feature.name]) if feature.name in raw else None)
            except WrongWeight as error:
                raise UserError(f"row {first_row + error.row}: feature {feature.name!r} {error.problem}") from None
        return found


def _row_of(item: int, offsets: np.ndarray) -> int:
    return int(np.searchsorted(offsets, item, side="right")) - 1


def _shown(item: Any) -> str:
    return "a missing item" if item is None else shown(item)


def _number(item: Any) -> Any:
    """Return the number of a text; what is none stays, to be refused."""
    if not isinstance(item, str):
        return item
    if not item:
        return None
    return float(item) if re.fullmatch(NUMBER, item, re.ASCII) else item
