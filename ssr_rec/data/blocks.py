"""Holds rows as a shard has them, column by column, before they are a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Lists(NamedTuple):
    """Holds a list feature of ``n`` rows: ids row after row, int64 (n + 1,) offsets into them and (n,) lengths."""

    ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None
    """Of the ids, float32; None: the items have none."""

    def taken(self, rows: np.ndarray) -> Lists:
        """Return the lists of ``rows``, in that order."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        taken = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=taken[1:])
        # Position i of the result lies `i - taken[its row]` behind the start of its row's list.
        places = np.arange(taken[-1]) + np.repeat(starts - taken[:-1], lengths)
        return Lists(self.ids[places], taken, lengths, None if self.weights is None else self.weights[places])


@dataclass
class Block:
    """Holds ``n`` decoded rows; ids are int32 where all tables are small enough, else int64.

    Attributes:
        scalars: (S, n) ids of the single-valued features in schema order.
        lists: list features in schema order.
        labels: (n, T) float32, 0 where not observed.
        group_ids: (n,) int64 or None.
        weights: (n, T) float32 of each row for each task, 0 where its label is not observed; None: all count the same.
        dense: (n, C) float32 scaled numbers and vectors, NaN where missing, or None of a dataset without.
        together: (n,) int64 ids of the groups whose rows lie together, or None.
    """

    scalars: np.ndarray
    lists: list[Lists]
    labels: np.ndarray
    group_ids: np.ndarray | None
    weights: np.ndarray | None = None
    dense: np.ndarray | None = None
    together: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.labels)
