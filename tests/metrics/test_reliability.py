"""Calibration by decile and the precision-recall curve against plain loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from ssr_rec.metrics.reliability import deciles, precision_recall
from ssr_rec.metrics.split_metrics import BoundedMetrics, ExactMetrics


def drawn(rows: int, levels: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.5, rows).astype(np.float32)
    if levels is not None:
        logits = (np.round(logits * levels) / levels).astype(np.float32)
    return logits, (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)


@pytest.mark.parametrize("levels", [None, 3])
def test_deciles_are_those_of_a_plain_loop(levels):
    logits, labels = drawn(997, levels)
    rows = sorted(zip(logits.tolist(), labels.tolist(), strict=True))
    parts: dict[int, list[tuple[float, float]]] = {}
    for score in sorted({score for score, _ in rows}):
        below = sum(other < score for other, _ in rows)
        same = [(s, y) for s, y in rows if s == score]
        parts.setdefault(int((below + len(same) / 2) / len(rows) * 10), []).extend(same)
    found = deciles(logits, labels)
    assert len(found) == len(parts) > 3 and sum(part["rows"] for part in found) == 997
    for part, (_, wanted) in zip(found, sorted(parts.items()), strict=True):
        assert part["rows"] == len(wanted)
        assert part["predicted"] == pytest.approx(sum(1 / (1 + math.exp(-s)) for s, _ in wanted) / len(wanted))
        assert part["observed"] == pytest.approx(sum(y for _, y in wanted) / len(wanted))


def test_no_rows_or_a_nan_have_no_deciles():
    assert deciles(np.empty(0), np.empty(0)) == []
    assert deciles(np.array([0.5, math.nan]), np.array([0, 1])) == []


@pytest.mark.parametrize("levels", [None, 2])
def test_precision_and_recall_are_scikit_learns(levels):
    logits, labels = drawn(400, levels, seed=3)
    found = precision_recall(logits, labels)
    precision, recall, _ = precision_recall_curve(labels, logits)
    wanted = set(zip(precision.round(9).tolist(), recall.round(9).tolist(), strict=True))
    points = list(zip(found.precision.round(9).tolist(), found.recall.round(9).tolist(), strict=True))
    assert set(points) <= wanted and len(points) > 5 and found.recall[-1] == 1
    assert found.average_precision == pytest.approx(average_precision_score(labels, logits))
    assert math.isnan(precision_recall(logits, np.zeros(400)).average_precision)


def test_bounded_deciles_are_nearly_the_exact_ones():
    logits, labels = drawn(20_000)
    logits[:3] = 40, -40, 17
    found = []
    for metrics in (ExactMetrics(["click"]), BoundedMetrics(["click"], 100)):
        metrics.update(torch.from_numpy(logits)[:, None], torch.from_numpy(labels)[:, None], None)
        metrics.compute()
        found.append(metrics.deciles()["click"])
    assert len(found[0]) == len(found[1]) == 10
    for exact, bounded in zip(*found, strict=True):
        assert abs(exact["rows"] - bounded["rows"]) <= 2
        assert exact["predicted"] == pytest.approx(bounded["predicted"], abs=1e-4)
        assert exact["observed"] == pytest.approx(bounded["observed"], abs=2e-3)
