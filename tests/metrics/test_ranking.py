"""Measures of rankings against scikit-learn, and against loops over every order of tied rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import ndcg_score

from ssr_rec.metrics.ranking import ranking_measures
from ssr_rec.metrics.ranking_fold import RankingMetrics
from tests.ranks import run_ranks

NAMES = ["ndcg@1", "ndcg@3", "ndcg@10", "mrr", "hit@1", "hit@3", "hit@10"]


def rows(seed: int, num_groups: int = 40, most: int = 7, values: int = 4):
    """Scores with many ties, labels and groups in no order; some groups have one row, or no positive."""
    draw = np.random.default_rng(seed)
    groups = np.repeat(draw.permutation(num_groups) * 10**15 - 5, draw.integers(1, most, num_groups))
    draw.shuffle(groups)
    return draw.integers(0, values, len(groups)).astype(np.float32), draw.random(len(groups)) < 0.3, groups


def of_order(labels: tuple[bool, ...], name: str) -> float:
    """A measure of rows in one order."""
    kind, _, k = name.partition("@")
    if kind == "mrr":
        return 1 / (labels.index(True) + 1)
    if kind == "hit":
        return float(any(labels[: int(k)]))
    best = sorted(labels, reverse=True)
    dcg, ideal = (sum(y / math.log2(2 + place) for place, y in enumerate(found[: int(k)])) for found in (labels, best))
    return dcg / ideal


def by_loops(scores, labels, groups, name: str) -> list[float]:
    """The mean over all orders of tied rows of each group that counts."""
    found = []
    for group in sorted(set(groups.tolist())):
        own = [(float(x), bool(y)) for x, y, g in zip(scores, labels, groups, strict=True) if g == group]
        if len(own) < 2 or not any(y for _, y in own):
            continue
        orders = [o for o in itertools.permutations(own) if all(a[0] >= b[0] for a, b in itertools.pairwise(o))]
        found.append(float(np.mean([of_order(tuple(y for _, y in order), name) for order in orders])))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_measures_are_means_over_all_orders_of_ties(seed):
    scores, labels, groups = rows(seed, num_groups=25)
    found = ranking_measures(scores, labels, groups, NAMES)
    for name in NAMES:
        expected = by_loops(scores, labels, groups, name)
        assert found[name] == pytest.approx(np.mean(expected), abs=1e-12), name
        assert found["ranking_groups"] == len(expected) > 8


def test_ndcg_is_that_of_scikit_learn():
    scores, labels, groups = rows(7, num_groups=300, most=60, values=25)
    found = ranking_measures(scores, labels, groups, ["ndcg@1", "ndcg@5", "ndcg@100"])
    for k in (1, 5, 100):
        expected = []
        for group in np.unique(groups):
            own = groups == group
            if own.sum() > 1 and labels[own].any():
                expected.append(ndcg_score(labels[own][None].astype(int), scores[own][None], k=k))
        assert found[f"ndcg@{k}"] == pytest.approx(np.mean(expected), abs=1e-12)


def test_neither_the_order_of_rows_nor_an_increasing_map_changes_a_bit():
    scores, labels, groups = rows(3, num_groups=200, most=30)
    weights = np.random.default_rng(0).random(len(scores))
    order = np.random.default_rng(1).permutation(len(scores))
    here = ranking_measures(scores, labels, groups, NAMES, weights)
    there = ranking_measures(np.exp(scores[order]), labels[order], groups[order], NAMES, weights[order])
    assert here == there


def test_a_large_block_of_ties_is_a_random_order():
    """By exact integers: of 20,000 equal rows 3 are positive, anywhere."""
    n, p = 20_000, 3
    labels = np.arange(n) % (n // p + 1) == 0
    assert labels.sum() == p
    found = ranking_measures(np.zeros(n), labels, np.zeros(n, np.int64), ["mrr", "hit@1000", "hit@9999"])
    chances = [math.comb(n - r, p - 1) / math.comb(n, p) for r in range(1, n - p + 2)]
    assert found["mrr"] == pytest.approx(sum(c / r for r, c in enumerate(chances, 1)), rel=1e-8)
    assert found["hit@1000"] == pytest.approx(1 - math.comb(n - 1000, p) / math.comb(n, p), rel=1e-8)
    assert found["hit@9999"] == pytest.approx(1 - math.comb(n - 9999, p) / math.comb(n, p), rel=1e-8)


def test_rows_of_weight_0_are_absent_and_groups_count_by_their_mean_weight():
    scores, labels, groups = rows(4, num_groups=60)
    draw = np.random.default_rng(0)
    of_group = {group: int(draw.integers(1, 4)) for group in set(groups.tolist())}
    weights = np.array([of_group[group] for group in groups.tolist()]) * (draw.random(len(groups)) < 0.8)
    kept = weights > 0
    found = ranking_measures(scores, labels, groups, NAMES, weights)
    for name in NAMES:
        values = by_loops(scores[kept], labels[kept], groups[kept], name)
        counted = [
            of_group[g]
            for g in sorted(set(groups[kept].tolist()))
            if (groups[kept] == g).sum() > 1 and labels[kept][groups[kept] == g].any()
        ]
        assert found[name] == pytest.approx(np.average(values, weights=counted), abs=1e-12)


def test_what_cannot_be_ranked_is_nan():
    none = ranking_measures(np.zeros(3), np.zeros(3), np.zeros(3), ["mrr", "ndcg@2"])
    assert math.isnan(none["mrr"]) and math.isnan(none["ndcg@2"]) and none["ranking_groups"] == 0
    single = ranking_measures(np.zeros(2), np.ones(2), np.arange(2), ["hit@1"])
    assert math.isnan(single["hit@1"])
    assert math.isnan(ranking_measures(np.array([0, np.nan]), np.ones(2), np.zeros(2), ["hit@1"])["hit@1"])


def fold(rank: int, ranks: int, max_rows: int | None) -> dict | None:
    scores, labels, groups = rows(11, num_groups=400, most=9, values=50)
    weights = np.random.default_rng(2).integers(0, 3, (len(scores), 2)).astype(np.float32)
    logits = np.stack([scores, -scores], 1)
    outcomes = np.stack([labels, ~labels], 1)
    metrics = RankingMetrics(["mrr", "ndcg@2"], {"second": 1, "first": 0}, max_rows)
    for own in np.array_split(np.arange(len(scores)), 8)[rank::ranks]:
        parts = (torch.from_numpy(x[own]) for x in (logits, outcomes, groups))
        keys, of_rows = torch.from_numpy(own), torch.from_numpy(weights[own])
        metrics.update(*parts, keys, of_rows)
    found = metrics.compute()
    if found is not None and max_rows is None:
        for task, column in (("first", 0), ("second", 1)):
            of_task = logits[:, column], outcomes[:, column], groups, ["mrr", "ndcg@2"], weights[:, column]
            assert found[task] == ranking_measures(*of_task)
    return found


def both() -> tuple:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return fold(rank, ranks, None), fold(rank, ranks, 1300)


@pytest.mark.slow
def test_a_fold_over_ranks_is_that_of_one_process():
    (exact, bounded), elsewhere = run_ranks(both, 2)
    assert elsewhere == (None, None)
    assert exact == fold(0, 1, None)
    # Groups are sampled by their ids, so that more ranks sample the same ones.
    assert bounded["first"]["ranking_share"] == 0.5
    assert 0.4 < bounded["first"]["ranking_groups"] / exact["first"]["ranking_groups"] < 0.6
    assert bounded["first"]["mrr"] == pytest.approx(exact["first"]["mrr"], abs=0.06)
