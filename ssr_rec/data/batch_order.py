"""Decides which rows make up global batch k, by a rule that does not know how many ranks there are.

The rows of a split, row group by row group in the epoch's shuffled order, form one line. The line is cut into
``num_lanes`` lanes; global batch k takes the next few rows of every lane. A rank owns some of the lanes and reads
only their row groups. Hence

* the rows of global batch k, and their order, are the same on 1 and on 16 ranks (as long as ``num_lanes`` is);
* every rank has the same number of steps, known before the first one, however uneven the shards are;
* every row is read exactly once an epoch, and a position is just (epoch, step) on any number of ranks.

A row group that lies across two lanes is opened twice, at most ``num_lanes`` times an epoch in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Names rows ``start:stop`` of a row group, counted in the group's own shuffled order."""

    group: int
    start: int
    stop: int


class Lanes:
    """Cuts ``sum(group_rows)`` rows into global batches of ``batch_size`` rows over ``num_lanes`` lanes.

    Args:
        group_rows: rows of each row group, in the epoch's order.
        order: the epoch's order, a permutation of the row groups' indices.
        batch_size: rows of a global batch; the last one of an epoch may be shorter.
        num_lanes: at most ``batch_size``.
    """

    def __init__(self, group_rows: np.ndarray, order: np.ndarray, batch_size: int, num_lanes: int) -> None:
        self.order = order
        self.ends = np.cumsum(group_rows[order])
        self.num_rows = int(self.ends[-1]) if len(self.ends) else 0
        self.batch_size, self.num_lanes = batch_size, num_lanes
        self.full_steps, self.last_rows = divmod(self.num_rows, batch_size)
        self.num_steps = self.full_steps + (self.last_rows > 0)

    def rows_in_step(self, step: int) -> int:
        """Return rows of global batch ``step``."""
        return self.batch_size if step < self.full_steps else self.last_rows

    def lane_rows(self, step: int, lane: int) -> int:
        """Return rows that ``lane`` gives to global batch ``step``."""
        return self._share(self.rows_in_step(step), lane)

    def _share(self, rows: int, lane: int) -> int:
        return (lane + 1) * rows // self.num_lanes - lane * rows // self.num_lanes

    def _lane_start(self, lane: int) -> int:
        # The shares of the lanes before, which telescope.
        full, last = lane * self.batch_size // self.num_lanes, lane * self.last_rows // self.num_lanes
        return self.full_steps * full + last

    def pieces(self, lane: int, start_step: int) -> Iterator[Piece]:
        """Yield what ``lane`` reads from ``start_step`` to the end of the epoch, in order."""
        start = self._lane_start(lane)
        stop = self._lane_start(lane + 1)
        position = start + min(start_step, self.full_steps) * self._share(self.batch_size, lane)
        if start_step > self.full_steps:
            position = stop
        index = int(np.searchsorted(self.ends, position, side="right"))
        while position < stop:
            end = int(self.ends[index])
            group_start = int(self.ends[index - 1]) if index else 0
            upto = min(end, stop)
            yield Piece(int(self.order[index]), position - group_start, upto - group_start)
            position, index = upto, index + 1


def lanes_of_rank(num_lanes: int, rank: int, world_size: int) -> range:
    """Return the consecutive lanes that ``rank`` reads; together the ranks cover every lane once."""
    return range(rank * num_lanes // world_size, (rank + 1) * num_lanes // world_size)


def order_of_groups(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an order (n,) of rows in which groups, runs of equal ``ids`` (n,), are shuffled and stay whole."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    chosen = rng.permutation(len(starts))
    lengths = np.diff(starts, append=len(ids))[chosen]
    before = np.cumsum(lengths) - lengths
    return np.arange(len(ids)) + np.repeat(starts[chosen] - before, lengths)


def runs_of(ids: np.ndarray, lane_rows: Sequence[int]) -> np.ndarray:
    """Return the number (n,) of the run of equal ``ids`` (n,) that each row is in, from 0.

    A run ends with its lane, so that the runs of a global batch do not depend on which rank has which lanes: parts of
    one group may meet in a batch when row groups cut it.

    Args:
        lane_rows: how many rows each lane gave, one after the other.
    """
    begins = np.diff(ids, prepend=0) != 0
    starts = np.cumsum([0, *lane_rows[:-1]])
    begins[starts[starts < len(ids)]] = True
    return np.cumsum(begins) - 1


def share_cut(groups: int | None, rows: int, ends: int) -> float | None:
    """Return about what share of ``groups`` of ``rows`` rows is cut at ``ends`` places; None without groups.

    Neighbours are of one group with the probability ``1 - groups / rows``.
    """
    return min(1.0, ends * (1 - groups / rows) / groups) if groups else None
