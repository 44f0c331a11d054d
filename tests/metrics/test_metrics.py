"""Metrics against scikit-learn and plain loops, and the gather against one process."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score

from ssr_rec.metrics import exact as metrics
from ssr_rec.metrics.exact import auc, calibration, evaluate_predictions, gather_predictions, gauc, logloss, ne
from ssr_rec.metrics.running import RunningAUC
from tests.ranks import run_ranks


def fold(rows: int, seed: int = 0, levels: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 logits, labels that depend on them, and groups of very different sizes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 2.0, rows).astype(np.float32)
    if levels is not None:
        logits = np.round(logits * levels) / levels
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    return logits, labels, (rng.pareto(1.0, rows) * 5).astype(np.int64)


@pytest.fixture(autouse=True)
def no_numpy_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("levels", [None, 10, 1], ids=["distinct", "ties", "heavy ties"])
@pytest.mark.parametrize("rows", [2, 17, 20_000])
def test_auc_is_scikit_learns(rows, levels):
    logits, labels, _ = fold(rows, levels=levels)
    labels[:2] = [0, 1]
    assert auc(logits, labels) == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)


def test_auc_of_one_score_for_all_is_a_half():
    assert auc(np.zeros(1000), np.arange(1000) % 2) == 0.5
    assert auc(np.array([-0.0, 0.0]), np.array([0, 1])) == 0.5


def test_auc_is_the_same_to_the_bit_in_any_row_order():
    logits, labels, groups = fold(5000, levels=3)
    order = np.random.default_rng(1).permutation(5000)
    assert auc(logits, labels) == auc(logits[order], labels[order])
    assert gauc(logits, labels, groups) == gauc(logits[order], labels[order], groups[order])


def test_auc_on_logits_sees_what_a_float32_sigmoid_hides():
    logits = np.array([20.0, 30.0], dtype=np.float32)
    labels = np.array([0, 1])
    assert auc(logits, labels) == 1.0
    assert auc(1 / (1 + np.exp(-logits)), labels) == 0.5


@pytest.mark.parametrize(
    "scores, labels",
    [([], []), ([0.3], [1]), ([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, 0]), ([0.1, math.nan], [0, 1])],
    ids=["no rows", "one row", "positives only", "negatives only", "nan score"],
)
def test_auc_and_gauc_are_nan_where_they_are_not_defined(scores, labels):
    scores, labels = np.array(scores, dtype=np.float32), np.array(labels, dtype=np.uint8)
    assert math.isnan(auc(scores, labels))
    value, groups, rows = gauc(scores, labels, np.zeros(len(scores), np.int64))
    assert math.isnan(value) and groups == 0 and rows == 0


def test_auc_handles_infinite_logits():
    assert auc(np.array([-np.inf, 0.0, np.inf]), np.array([0, 0, 1])) == 1.0


@pytest.mark.parametrize("levels", [None, 2])
def test_gauc_is_the_weighted_mean_over_a_loop_of_groups(levels):
    logits, labels, groups = fold(6000, levels=levels)
    total, rows, counted = 0.0, 0, 0
    for group in np.unique(groups):
        of_group = groups == group
        if 0 < labels[of_group].mean() < 1:
            total += of_group.sum() * roc_auc_score(labels[of_group], logits[of_group])
            rows += of_group.sum()
            counted += 1
    assert 10 < counted < len(np.unique(groups))
    assert gauc(logits, labels, groups) == pytest.approx((total / rows, counted, rows), abs=1e-12)


def test_gauc_does_not_confuse_equal_scores_of_neighbouring_groups():
    scores, labels = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 1, 0, 1])
    assert gauc(scores, labels, np.array([-7, -7, 9, 9])) == (1.0, 2, 4)


def test_gauc_of_one_group_is_auc():
    logits, labels, _ = fold(500, levels=2)
    assert gauc(logits, labels, np.zeros(500, np.int64)) == (auc(logits, labels), 1, 500)


def test_logloss_ne_and_calibration_are_scikit_learns():
    logits, labels, _ = fold(20_000)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert logloss(logits, labels) == pytest.approx(log_loss(labels, probability), rel=1e-12)
    base = log_loss(labels, np.full(20_000, labels.mean()))
    assert ne(logits, labels) == pytest.approx(log_loss(labels, probability) / base, rel=1e-12)
    assert calibration(logits, labels) == pytest.approx(probability.mean() / labels.mean(), rel=1e-12)


def test_ne_of_the_positive_rate_is_one_also_with_float32_labels():
    labels = (np.arange(1_000_003) % 50 == 0).astype(np.float32)
    rate = labels.astype(np.float64).mean()
    assert ne(np.full(len(labels), math.log(rate / (1 - rate))), labels) == pytest.approx(1.0, abs=1e-12)


def test_extreme_logits():
    logits = np.array([100, -100, 100, -100], dtype=np.float32)
    labels = np.array([1, 0, 0, 1])
    assert logloss(logits, labels) == 50.0
    assert logloss(logits[:2], labels[:2]) == pytest.approx(math.exp(-100), rel=1e-9)
    assert calibration(logits * 100, labels) == 1.0
    assert auc(logits, labels) == 0.5


def test_measures_that_need_a_class_are_nan_without_it():
    assert math.isnan(logloss(np.zeros(0), np.zeros(0)))
    assert math.isnan(ne(np.zeros(2), np.ones(2))) and math.isnan(ne(np.zeros(0), np.zeros(0)))
    assert math.isnan(calibration(np.zeros(2), np.zeros(2)))
    assert logloss(np.zeros(1), np.ones(1)) == pytest.approx(math.log(2))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"scores have shape \(2,\), labels \(3,\)"):
        auc(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"labels must be 0 or 1, got 0\.5"):
        logloss(np.zeros(2), np.array([1.0, 0.5]))
    with pytest.raises(ValueError, match="give each row its group"):
        gauc(np.zeros(2), np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"must both be \(N, 2\) for the tasks click, like"):
        evaluate_predictions(np.zeros((4, 1)), np.zeros((4, 1)), None, ["click", "like"])


def test_evaluate_predictions_measures_each_task_on_its_column():
    logits, labels, groups = fold(300)
    both = evaluate_predictions(
        np.stack([logits, -logits], axis=1), np.stack([labels, labels], axis=1), groups, ["click", "like"]
    )
    assert list(both) == ["click", "like"]
    assert both["click"]["auc"] == auc(logits, labels) == pytest.approx(1 - both["like"]["auc"])
    value, num_groups, num_rows = gauc(logits, labels, groups)
    assert both["click"]["gauc"] == value
    assert (both["click"]["gauc_groups"], both["click"]["gauc_rows"]) == (num_groups, num_rows)
    alone = evaluate_predictions(logits[:, None], labels[:, None], None, ["click"])
    assert set(alone["click"]) == {"auc", "logloss", "ne", "calibration"}


ROWS_OF_RANKS = [(11, 5), (0, 7), (7, 0), (0, 0)]


def rank_rows(case: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * case + rank)
    rows = ROWS_OF_RANKS[case][rank]
    logits = torch.randn(rows, 2, generator=generator)
    return logits, (logits > 0.1).to(torch.uint8), torch.randint(0, 3, (rows,), generator=generator)


def gather_job() -> list[list[np.ndarray] | None]:
    """What this rank gets in each case; in rounds, as the longest rank has more rows than one takes."""
    metrics.ROWS_PER_GATHER = 4
    dist.init_process_group("gloo")
    got = []
    for case in range(len(ROWS_OF_RANKS)):
        rows = rank_rows(case, dist.get_rank())
        gathered, without_groups = gather_predictions(*rows), gather_predictions(*rows[:2], None)
        assert (gathered is None) == (without_groups is None)
        assert without_groups is None or without_groups[2] is None
        got.append(None if gathered is None else list(gathered))
    return got


def test_gather_brings_uneven_and_empty_ranks_to_rank_0():
    first, second = run_ranks(gather_job, 2)
    assert second == [None] * len(ROWS_OF_RANKS)
    for case, gathered in enumerate(first):
        alone = gather_predictions(
            *(torch.cat(parts) for parts in zip(rank_rows(case, 0), rank_rows(case, 1), strict=True))
        )
        assert alone is not None
        for got, wanted in zip(gathered, alone, strict=True):
            assert wanted is not None and got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)


def test_gather_without_a_process_group_is_this_processes_rows():
    logits, labels, groups = rank_rows(0, 0)
    gathered = gather_predictions(logits.requires_grad_().bfloat16(), labels, groups)
    assert gathered is not None and gathered[0].dtype == np.float32
    np.testing.assert_array_equal(gathered[0], logits.detach().bfloat16().float().numpy())


@pytest.mark.parametrize("batch", [1, 7, 64, 100, 250])
def test_running_auc_is_over_the_last_rows_exactly(batch):
    logits, labels, _ = fold(500)
    running = RunningAUC(["click", "seconds"], window=100, numbers=["seconds"])
    assert math.isnan(running.compute()["click"]["auc"]) and math.isnan(running.compute()["seconds"]["xauc"])
    for start in range(0, 500, batch):
        rows = slice(start, start + batch)
        # Of labels of two values XAUC is AUC.
        of_tasks = np.stack([labels[rows], 30.5 * labels[rows]], 1)
        running.update(torch.tensor(np.stack([logits[rows]] * 2, 1)), torch.tensor(of_tasks))
        end = min(500, start + batch)
        expected = pytest.approx(auc(logits[max(0, end - 100) : end], labels[max(0, end - 100) : end]), nan_ok=True)
        assert running.compute() == {"click": {"auc": expected}, "seconds": {"xauc": expected}}
    assert running._rows < 100 + batch


def test_running_auc_keeps_its_own_copy():
    running = RunningAUC(["click"])
    logits = torch.tensor([[0.0], [1.0]], requires_grad=True)
    running.update(logits, torch.tensor([[0.0], [1.0]]))
    with torch.no_grad():
        logits.mul_(-1)
    assert running.compute() == {"click": {"auc": 1.0}}
    with pytest.raises(ValueError, match="window is 0"):
        RunningAUC(["click"], window=0)
