"""Lays out lists that several rows share, such as the history of one user beside many candidates."""

from __future__ import annotations

import numpy as np

from ssr_rec.serving.raw_rows import Encoded


def events_of_rows(offsets: np.ndarray, of_rows: np.ndarray | None) -> np.ndarray:
    """Return which ids of G lists are those of B rows, row by row: (N,) int64.

    Args:
        offsets: (G + 1,), where each list begins.
        of_rows: (B,), the list of each row; None: row k has the k-th.
    """
    if of_rows is None:
        return np.arange(offsets[-1])
    lengths = np.diff(offsets)[of_rows]
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(offsets[of_rows] - (ends - lengths), lengths)


def flat(encoded: Encoded) -> Encoded:
    """Return the same rows, each with its own copy of its lists."""
    lists = []
    weights = list(encoded.weights or [None] * len(encoded.lists))
    for place, ((values, offsets), of_rows) in enumerate(zip(encoded.lists, encoded.of_rows, strict=True)):
        if of_rows is None:
            lists.append((values, offsets))
        else:
            ends, items = np.cumsum([0, *np.diff(offsets)[of_rows]]), events_of_rows(offsets, of_rows)
            lists.append((values[items], ends))
            own = weights[place]
            weights[place] = None if own is None else own[items]
    return Encoded(encoded.ids, lists, [None] * len(lists), encoded.dense, weights if encoded.weights else None)
