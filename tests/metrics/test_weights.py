"""Weights of rows in every measure: against scikit-learn's, and against rows that are repeated or left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from ssr_rec.metrics.exact import auc, calibration, gauc, logloss, ne
from ssr_rec.metrics.reliability import deciles, precision_recall, sigmoid
from ssr_rec.metrics.split_metrics import BoundedMetrics, ExactMetrics
from ssr_rec.training.setup import start_process_group

LABELS = ["click", "pay"]
EXACT = ("auc", "gauc", "gauc_groups", "gauc_rows")


def rows(count: int, seed: int, kind: str) -> tuple[np.ndarray, ...]:
    """Logits with ties, labels, groups and weights of two tasks."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 2, (count, 2)), 1).astype(np.float32)
    labels = (rng.random((count, 2)) < sigmoid(logits)).astype(np.float32)
    weights = rng.integers(0, 4, (count, 2)) if kind == "whole" else rng.gamma(0.3, 5, (count, 2))
    return logits, labels, rng.integers(0, count // 20 + 1, count), weights.astype(np.float32)


@pytest.mark.parametrize("kind", ["whole", "any"])
@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_scikit_learn(kind, seed):
    logits, labels, groups, weights = rows(600, seed, kind)
    x, y, w = logits[:, 0], labels[:, 0], weights[:, 0].astype(np.float64)
    p = sigmoid(x)
    assert auc(x, y, w) == pytest.approx(sk.roc_auc_score(y, x, sample_weight=w), abs=1e-12)
    loss, rate = sk.log_loss(y, p, sample_weight=w), np.average(y, weights=w)
    assert logloss(x, y, w) == pytest.approx(loss, rel=1e-12)
    always = sk.log_loss(y, np.full(len(y), rate), sample_weight=w)
    assert ne(x, y, w) == pytest.approx(loss / always, rel=1e-12)
    assert calibration(x, y, w) == pytest.approx(np.average(p, weights=w) / rate, rel=1e-12)
    areas, sums = [], []
    for group in np.unique(groups[w > 0]):
        own = (groups == group) & (w > 0)
        if len(set(y[own])) == 2:
            areas.append(sk.roc_auc_score(y[own], x[own], sample_weight=w[own]))
            sums.append(w[own].sum())
    found = gauc(x, y, groups, w)
    assert found.value == pytest.approx(np.average(areas, weights=sums), abs=1e-12)
    assert (found.groups, found.rows) == (len(areas), pytest.approx(sum(sums)))
    average = sk.average_precision_score(y, x, sample_weight=w)
    assert precision_recall(x, y, weights=w).average_precision == pytest.approx(average, abs=1e-12)


def measured(kind: str, parts: tuple[np.ndarray, ...], max_rows: int = 10**6) -> dict:
    start_process_group("cpu")
    found = ExactMetrics(LABELS) if kind == "exact" else BoundedMetrics(LABELS, max_rows)
    for start in range(0, len(parts[0]), 97):
        logits, labels, groups, *weights = (torch.from_numpy(part[start : start + 97]) for part in parts)
        found.update(logits, labels, groups, None, *weights)
    tasks = found.compute()
    assert tasks is not None
    return {"tasks": tasks, "deciles": found.deciles()}


@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_a_weight_of_two_is_the_row_twice_and_of_zero_its_absence(mode):
    logits, labels, groups, weights = rows(700, 5, "whole")
    weights[:, 1] = weights[:, 0]
    copies = np.repeat(np.arange(700), weights[:, 0].astype(int))
    again = tuple(part[copies] for part in (logits, labels, groups))
    whole = measured(mode, (logits, labels, groups, weights))
    plain, ones = measured(mode, again), measured(mode, (*again, np.ones((len(copies), 2), np.float32)))
    for task in LABELS:
        for name, value in whole["tasks"][task].items():
            assert ones["tasks"][task][name] == pytest.approx(value, rel=1e-14, abs=1e-15), name
            assert plain["tasks"][task][name] == pytest.approx(value, rel=1e-14, abs=1e-15), name
            if name in EXACT:
                assert plain["tasks"][task][name] == value, name
        for one, other in zip(whole["deciles"][task], plain["deciles"][task], strict=True):
            assert one == pytest.approx(other)
    # Twice is a power of two, which no product rounds: then sums are equal to the bit as well.
    doubled = tuple(np.concatenate([part, part[:300]]) for part in (logits, labels, groups))
    twice = np.where(np.arange(700) < 300, 2, 1)[:, None].repeat(2, 1).astype(np.float32)
    one, two = measured("exact", (logits, labels, groups, twice)), measured("exact", (*doubled, np.ones((1000, 2))))
    assert one["tasks"] == two["tasks"]


@pytest.mark.parametrize("kind", ["whole", "any"])
def test_bounded_measures_hold_their_bounds(kind):
    parts = rows(5000, 6, kind)
    exact, bounded = measured("exact", parts)["tasks"], measured("bounded", parts)["tasks"]
    sampled = measured("bounded", parts, 2500)["tasks"]
    for task in LABELS:
        assert abs(bounded[task]["auc"] - exact[task]["auc"]) <= bounded[task]["auc_bound"]
        for name in ("logloss", "ne", "calibration", "gauc"):
            assert bounded[task][name] == pytest.approx(exact[task][name], rel=1e-11)
        assert sampled[task]["gauc_share"] < 1 and sampled[task]["gauc_rows"] < exact[task]["gauc_rows"]
        assert abs(sampled[task]["gauc"] - exact[task]["gauc"]) <= sampled[task]["gauc_bound"] < 0.2


@pytest.mark.parametrize("mode", ["exact", "bounded"])
def test_a_row_of_no_weight_may_hold_anything_and_a_task_may_have_no_rows(mode):
    logits, labels, groups, weights = rows(300, 7, "any")
    counted = measured(mode, (logits, labels, groups, weights))["tasks"]["click"]
    weights[:, 1] = 0
    weights[:5, 0] = 0
    without = measured(mode, (logits[5:], labels[5:], groups[5:], weights[5:]))["tasks"]["click"]
    logits[:5] = math.nan
    found = measured(mode, (logits, labels, groups, weights))["tasks"]
    assert found["click"] == pytest.approx(without) and found["click"] != counted
    assert all(math.isnan(found["pay"][name]) for name in ("auc", "gauc", "logloss", "ne", "calibration"))
    assert deciles(logits[:, 1], labels[:, 1], weights=weights[:, 1]) == []


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_odd_weights_are_refused(bad):
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        auc(np.zeros(3), np.array([0, 1, 1]), np.array([1, bad, 1]))
    with pytest.raises(ValueError, match="give each row its weight"):
        logloss(np.zeros(3), np.array([0, 1, 1]), np.ones(2))
