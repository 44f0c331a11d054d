"""Measures of labels that are numbers: against scikit-learn, plain loops over pairs, and rows repeated or left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from ssr_rec.common.errors import UserError
from ssr_rec.metrics.exact import auc, evaluate_predictions
from ssr_rec.metrics.links import Link
from ssr_rec.metrics.number_metrics import deciles_of_numbers, evaluate_numbers
from ssr_rec.metrics.numbers import calibration_of_numbers, mae, rmse, xauc
from ssr_rec.metrics.split_metrics import Further, fold_metrics

LINKS = {"watch_s": Link(function="exp", inner_scale=0.5, inner_shift=1.0, shift=-1.0, least=0.0)}


def drawn(rows: int, seed: int, weights: str = "whole") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and labels with ties, and weights of which some are 0."""
    rng = np.random.default_rng(seed)
    labels = np.round(np.exp(rng.normal(1, 1, rows)), 1)
    scores = np.round(np.log1p(labels) + rng.normal(0, 1, rows), 1)
    w = rng.integers(0, 4, rows) if weights == "whole" else rng.gamma(0.3, 5, rows)
    return scores, labels, w.astype(np.float64)


def pairs(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """XAUC by two plain loops."""
    right = total = 0.0
    for i in range(len(scores)):
        for j in range(i):
            if labels[i] != labels[j]:
                same = np.sign(labels[i] - labels[j]) * np.sign(scores[i] - scores[j])
                total += weights[i] * weights[j]
                right += weights[i] * weights[j] * (0.5 + same / 2)
    return right / total


@pytest.mark.parametrize("kind", ["whole", "any"])
@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_scikit_learn_and_of_plain_loops(kind: str, seed: int) -> None:
    x, y, w = drawn(70, seed, kind)
    assert rmse(x, y, w) == pytest.approx(math.sqrt(sk.mean_squared_error(y, x, sample_weight=w)), rel=1e-12)
    assert mae(x, y, w) == pytest.approx(sk.mean_absolute_error(y, x, sample_weight=w), rel=1e-12)
    assert calibration_of_numbers(x, y, w) == pytest.approx((x * w).sum() / (y * w).sum(), rel=1e-12)
    assert xauc(x, y, w) == pytest.approx(pairs(x, y, w), abs=1e-12)
    assert xauc(x, y) == pytest.approx(pairs(x, y, np.ones(70)), abs=1e-12)


def test_xauc_of_two_labels_is_auc() -> None:
    x, y, w = drawn(500, 4)
    clicks = (y > 2).astype(float)
    assert xauc(x, clicks, w) == auc(x, clicks, w) and xauc(x, clicks) == auc(x, clicks)
    assert xauc(-x, y, w) == pytest.approx(1 - xauc(x, y, w), abs=1e-15)
    assert xauc(y, y) == 1 and math.isnan(xauc(x, np.ones(500))) and math.isnan(xauc(x * math.nan, y))
    assert math.isnan(xauc(x[:0], y[:0])) and math.isnan(rmse(x[:0], y[:0]))


def test_a_weight_of_two_is_the_row_twice_and_of_zero_its_absence() -> None:
    x, y, w = drawn(300, 5)
    copies = np.repeat(np.arange(300), w.astype(int))
    assert xauc(x, y, w) == xauc(x[copies], y[copies])
    for measure in (rmse, mae, calibration_of_numbers):
        assert measure(x, y, w) == pytest.approx(measure(x[copies], y[copies]), rel=1e-14)
    mine, theirs = deciles_of_numbers(x, y, w), deciles_of_numbers(x[copies], y[copies])
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other)


def test_odd_input_is_refused_and_calibration_needs_labels_from_0_on() -> None:
    x, y, _ = drawn(10, 0)
    with pytest.raises(UserError, match=r"predictions have shape \(9,\)"):
        rmse(x[:9], y)
    with pytest.raises(UserError, match="labels must be finite, got nan"):
        mae(x, np.full(10, math.nan))
    with pytest.raises(UserError, match=r"weights must be finite and not negative, got -1\.0"):
        xauc(x, y, -np.ones(10))
    assert math.isnan(calibration_of_numbers(x, y - 50)) and math.isnan(calibration_of_numbers(x, 0 * y))


def spread(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> float:
    """A measure of somebody's own."""
    assert scores.shape == labels.shape == weights.shape == groups.shape
    return float(np.average(np.abs(scores - labels), weights=weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_fold_of_both_kinds_has_the_measures_of_each(weighted: bool) -> None:
    rng = np.random.default_rng(6)
    names, rows = ["click", "watch_s"], 400
    logits = rng.normal(0, 1, (rows, 2)).astype(np.float32)
    labels = np.stack([rng.random(rows) < 0.3, np.exp(rng.normal(1, 1, rows))], 1).astype(np.float32)
    weights = rng.integers(0, 3, (rows, 2)).astype(np.float32) if weighted else None
    if weights is not None:  # a row that does not count may hold anything
        logits[weights == 0], labels[weights[:, 1] == 0, 1] = math.nan, -5.0
    groups = rng.integers(0, 20, rows)
    found = {}
    for mode in ("exact", "bounded"):
        functions = {"spread": spread} if mode == "exact" else {}
        metrics = fold_metrics(mode, 100, rows, names, Further(LINKS, functions))
        for start in range(0, rows, 60):
            part = slice(start, start + 60)
            parts = (torch.from_numpy(each[part]) for each in (logits, labels, groups))
            metrics.update(*parts, None, None if weights is None else torch.from_numpy(weights[part]))
        found[mode] = metrics.compute()
        assert set(metrics.deciles()) == ({"click", "watch_s"} if mode == "exact" else {"click"})
    of = [None if weights is None else weights[:, [place]] for place in (0, 1)]
    click = evaluate_predictions(logits[:, :1], labels[:, :1], groups, ["click"], of[0])["click"]
    watched = evaluate_numbers(logits[:, 1:], labels[:, 1:], LINKS, of[1])["watch_s"]
    exact, bounded = found["exact"], found["bounded"]
    assert list(exact) == names
    assert {key: value for key, value in exact["click"].items() if key != "spread"} == click
    assert {key: value for key, value in exact["watch_s"].items() if key != "spread"} == watched
    predicted = LINKS["watch_s"].predict(logits[:, 1])
    w = np.ones(rows) if weights is None else weights[:, 1]
    errors = abs(predicted - labels[:, 1])
    assert watched["mae"] == pytest.approx(np.average(errors[w > 0], weights=w[w > 0]), rel=1e-6)
    assert exact["watch_s"]["spread"] == pytest.approx(watched["mae"], rel=1e-12)
    assert set(bounded["watch_s"]) == {"rmse", "mae", "calibration"}
    for name, value in bounded["watch_s"].items():
        assert value == pytest.approx(watched[name], rel=1e-12)


def test_a_measure_that_raises_is_said_by_name() -> None:
    metrics = fold_metrics("exact", 1, 1, ["click"], Further({}, {"broken": lambda *given: 1 / 0}))
    metrics.update(torch.zeros(3, 1), torch.ones(3, 1), None)
    with pytest.raises(UserError, match=r"train\.extra_metrics: broken of 3 rows: ZeroDivisionError"):
        metrics.compute()


def test_a_task_of_which_no_row_counts_has_no_measure_of_ones_own() -> None:
    """As a day may be without a purchase; few functions of one's own take no rows."""
    metrics = fold_metrics("exact", 1, 3, ["click"], Further({}, {"broken": lambda *given: 1 / 0}))
    metrics.update(torch.zeros(3, 1), torch.zeros(3, 1), None, None, torch.zeros(3, 1))
    assert math.isnan((metrics.compute() or {})["click"]["broken"])
