"""Defines weights of a list's items: how raw ones are read, where shards have them, and how they enter the pooling.

A weighted list is pooled to ``sum_i w_i e_i`` or, as a mean, to ``sum_i w_i e_i / sum_i w_i``, which is 0 where all
weights are.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from ssr_rec.common.errors import UserError

MAX_WEIGHT = float(np.finfo(np.float32).max)
"""Weights are stored in float32."""
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
"""The text of a weight."""
RULE = f"a weight is a number from 0 to {MAX_WEIGHT:.3g}, and every item has one"


def is_mark(weights: str) -> bool:
    """Return whether ``weights`` is what stands between an item and its weight, and not the name of a column."""
    return re.search(r"\w", weights) is None


def stored_weights(name: str) -> str:
    """Return the column of a shard that has the weights of list feature ``name``."""
    return f"__weights__{name}"


class WrongWeight(UserError):
    """Is raised for a weight that cannot be, with its row."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row} {problem}")
        self.row, self.problem = row, problem


def checked_weights(weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return weights (n,) as float32.

    Args:
        offsets: (B + 1,), where each row's begin.

    Raises:
        WrongWeight: one is missing, negative, or beyond float32.
    """
    wrong = ~((weights >= 0) & (weights <= MAX_WEIGHT))
    if wrong.any():
        at = int(wrong.argmax())
        row = int(np.searchsorted(offsets, at + offsets[0], side="right")) - 1
        shown = "missing or no number" if np.isnan(weights[at]) else str(weights[at])
        raise WrongWeight(row, f"has an item whose weight is {shown}; {RULE}")
    return weights.astype(np.float32)


def cut_weight(item: str, mark: str) -> tuple[str, float]:
    """Return what stands before the last ``mark`` of an item, and the number behind it; NaN where there is none."""
    value, found, weight = item.rpartition(mark)
    if not found:
        return item, float("nan")
    return value, float(weight) if re.fullmatch(NUMBER, weight, re.ASCII) else float("nan")


def pooling_weights(weights: Tensor, lengths: Tensor, is_mean: bool) -> Tensor:
    """Return what a sum of embeddings takes as weights (n,) float32, for a mean ``w_i / sum_i w_i``.

    Args:
        weights: (n,) float32.
        lengths: (B,) items of each row.
    """
    if not is_mean:
        return weights
    wide = weights.double()
    # Each row's sum in the order of its items, so that it is the same in any batch.
    totals = torch.segment_reduce(wide, "sum", lengths=lengths.long(), unsafe=True)
    of_items = totals.repeat_interleave(lengths)
    return torch.where(of_items > 0, wide / of_items, 0.0).float()
