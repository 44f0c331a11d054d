"""Computes measures of rankings: NDCG@k, MRR and hit@k of the rows of a group, such as a request, averaged over groups.

A group counts if it has a positive and at least two rows. Rows of equal scores have no order: a measure is the mean
over all orders of such rows, so that it depends neither on the order of rows nor on batches.

Where rows have weights, those of weight 0 are not there, and a group counts by the mean weight of its rows: a list
either has a row or not, and a group all of whose rows have weight 2 is the group twice.

Shapes: ``N`` rows of the fold, ``G`` groups that count, ``P`` positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ssr_rec.metrics.exact import checked_rows

GROUPS = "ranking_groups"
"""Counts the groups behind the measures of a task."""


class _Ranked(NamedTuple):
    """Holds blocks of rows of equal scores, the highest of each group first."""

    block_group: np.ndarray
    """(K,) group of each block, from 0 to G - 1, rising."""
    above: np.ndarray
    """(K,) rows of the group above the block."""
    rows: np.ndarray
    """(K,) rows of the block."""
    positives: np.ndarray
    """(K,) positive ones of them."""
    weight: np.ndarray
    """(G,) mean weight of the rows of each group."""


def ranking_measures(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    weights: np.ndarray | None = None,
) -> dict[str, float]:
    """Return the measures ``names``, such as ``ndcg@10``, ``mrr`` and ``hit@1``, and the number of groups that count.

    With a rank from 1 on, NDCG@k is the sum of ``1 / log2(1 + rank)`` over the positive rows of the first k, divided
    by the largest that it could be (Jarvelin and Kekalainen, TOIS 2002); MRR is ``1 / rank`` of the first positive row;
    hit@k is 1 if one of the first k rows is positive.

    Args:
        scores: ``(N,)`` any increasing function of the probability.
        labels: ``(N,)`` 0 or 1.
        groups: ``(N,)`` the group of each row, in any order.
        names: ``mrr``, ``ndcg@K`` or ``hit@K``.
        weights: ``(N,)``; None: all rows count the same.

    Returns:
        name -> mean over groups, nan without a group that counts or where a score is nan; and ``ranking_groups``.

    Raises:
        UserError: what ``exact.auc`` refuses.
    """
    if weights is not None:
        groups = np.asarray(groups)[np.asarray(weights) != 0]
    scores, positive, kept = checked_rows(scores, labels, weights)
    if not len(scores) or np.isnan(scores).any():
        return {**dict.fromkeys(names, math.nan), GROUPS: 0}
    ranked = _ranked(scores, positive, groups, np.ones(len(scores)) if kept is None else kept)
    total = math.fsum(ranked.weight)
    found: dict[str, float] = {}
    for name in names:
        kind, _, k = name.partition("@")
        values = _MEASURES[kind](ranked, int(k or 0))
        found[name] = math.fsum(values * ranked.weight) / total if total else math.nan
    return {**found, GROUPS: len(ranked.weight)}


def _ranked(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> _Ranked:
    """Return the blocks of the groups that count; the order of rows within a block is forgotten."""
    order = np.lexsort((-scores, groups))
    scores, positive, groups, weights = scores[order], positive[order], groups[order], weights[order]
    starts_group = np.concatenate(([True], groups[1:] != groups[:-1]))
    starts_block = starts_group | np.concatenate(([True], scores[1:] != scores[:-1]))
    block_start, group_start = np.flatnonzero(starts_block), np.flatnonzero(starts_group)
    rows = np.diff(block_start, append=len(scores))
    positives = np.add.reduceat(positive, block_start, dtype=np.int64)
    group_of_block = np.cumsum(starts_group)[block_start] - 1
    above = block_start - group_start[group_of_block]
    group_rows = np.diff(group_start, append=len(scores))
    counts = (group_rows > 1) & (np.add.reduceat(positive, group_start, dtype=np.int64) > 0)
    # Sums of weights in the order of rows would depend on it: those of a group are added in rising order.
    by_weight = np.lexsort((weights, groups))
    mean = np.add.reduceat(weights[by_weight].astype(np.float64), group_start) / group_rows
    used = counts[group_of_block]
    number = np.cumsum(counts) - 1
    return _Ranked(number[group_of_block[used]], above[used], rows[used], positives[used], mean[counts])


def _ndcg(ranked: _Ranked, k: int) -> np.ndarray:
    """Return NDCG@k (G,): each row of a block gains the block's mean label."""
    discounts = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))))
    first, last = np.minimum(ranked.above, k), np.minimum(ranked.above + ranked.rows, k)
    gains = (discounts[last] - discounts[first]) * ranked.positives / ranked.rows
    groups = len(ranked.weight)
    dcg = np.bincount(ranked.block_group, gains, groups)
    positives = np.bincount(ranked.block_group, ranked.positives, groups).astype(np.int64)
    return dcg / discounts[np.minimum(positives, k)]


def _first_blocks(ranked: _Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (G,) rows above, rows and positives of the first block of each group that has a positive."""
    with_positive = np.flatnonzero(ranked.positives)
    _, first = np.unique(ranked.block_group[with_positive], return_index=True)
    chosen = with_positive[first]
    return ranked.above[chosen], ranked.rows[chosen], ranked.positives[chosen]


def _mrr(ranked: _Ranked, _: int) -> np.ndarray:
    """Return MRR (G,): the mean of ``1 / rank`` over where in its block the first positive row may be."""
    above, rows, positives = _first_blocks(ranked)
    places = rows - positives + 1  # the first positive is at one of them
    group = np.repeat(np.arange(len(rows)), places)
    place = np.arange(len(group)) - np.repeat(np.cumsum(places) - places, places) + 1
    m, p = rows[group], positives[group]
    chance = np.exp(_log_choices(m - place, p - 1) - _log_choices(m, p))
    return np.bincount(group, chance / (above[group] + place), len(rows))


def _hit(ranked: _Ranked, k: int) -> np.ndarray:
    """Return hit@k (G,): the chance that one of the first k rows is positive."""
    above, rows, positives = _first_blocks(ranked)
    slots = np.clip(k - above, 0, rows)
    others = rows - positives
    missed = np.exp(_log_choices(others, np.minimum(slots, others)) - _log_choices(rows, slots))
    return np.where(slots > others, 1.0, 1.0 - missed)


def _log_choices(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return the logarithm of how many ways there are to choose k of n, exactly 0 where there is one."""
    factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n.max(initial=0) + 1)))))
    return factorials[n] - factorials[k] - factorials[n - k]


_MEASURES: dict[str, Callable[[_Ranked, int], np.ndarray]] = {"ndcg": _ndcg, "mrr": _mrr, "hit": _hit}
