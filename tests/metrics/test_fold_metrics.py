"""Bounded metrics of a fold against the exact ones, over batches and ranks, in memory that does not grow."""

import gc
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.data.batch import _mixed, row_keys
from ssr_rec.metrics.score_histogram import NUM_BINS
from ssr_rec.metrics.split_metrics import BoundedMetrics, ExactMetrics, fold_metrics
from ssr_rec.training.setup import start_process_group
from tests.jobs import train_job
from tests.metrics.test_group_sample import fold
from tests.ranks import run_ranks

LABELS = ["click", "like"]


def measured(metrics, parts, batch: int = 1000, groups: bool = True) -> dict:
    for start in range(0, len(parts[0]), batch):
        logits, labels, ids = (torch.from_numpy(part[start : start + batch]) for part in parts)
        metrics.update(logits, labels, ids if groups else None)
    return metrics.compute()


def test_bounded_is_exact_within_what_it_says():
    parts = fold(30_000, 500)
    exact, bounded = measured(ExactMetrics(LABELS), parts), measured(BoundedMetrics(LABELS, 30_000), parts)
    for name in LABELS:
        mine, theirs = bounded[name], exact[name]
        assert abs(mine["auc"] - theirs["auc"]) <= mine["auc_bound"] < 1e-5
        for key in ("logloss", "ne", "calibration"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-12)
        assert [mine[key] for key in ("gauc", "gauc_groups", "gauc_rows")] == [
            theirs[key] for key in ("gauc", "gauc_groups", "gauc_rows")
        ]
        assert mine["gauc_bound"] == 0 and mine["gauc_share"] == 1
    assert set(measured(BoundedMetrics(LABELS, 100), parts, groups=False)["like"]) == {
        "auc", "auc_bound", "logloss", "ne", "calibration"
    }  # fmt: skip


def test_keys_of_rows_are_equal_where_all_ids_are() -> None:
    draw, features, rows = random.Random(0), ["a", "list", "b", "other"], 300
    lists = [
        [[draw.randrange(2) for _ in range(draw.randrange(3) if name in ("list", "other") else 1)] for _ in range(rows)]
        for name in features
    ]
    lengths = torch.tensor([len(ids) for feature in lists for ids in feature])
    values = torch.tensor([i for feature in lists for ids in feature for i in ids])
    keys = row_keys(KeyedJaggedTensor.from_lengths_sync(features, values, lengths)).tolist()
    by_content: dict = {}
    for row in range(rows):
        by_content.setdefault(tuple(tuple(feature[row]) for feature in lists), set()).add(keys[row])
    assert all(len(found) == 1 for found in by_content.values())
    assert len(set.union(*by_content.values())) == len(by_content) > 50
    # Also where lists of one item are alone in a batch, as in the last one of a rank.
    single = next(row for row in range(rows) if len(lists[1][row]) == len(lists[3][row]) == 1)
    alone = torch.tensor([feature[single][0] for feature in lists])
    assert row_keys(KeyedJaggedTensor.from_lengths_sync(features, alone, torch.ones(4).long())).tolist() == [
        keys[single]
    ]
    none = KeyedJaggedTensor.from_lengths_sync(features, values[:0], lengths[:0])
    assert row_keys(none).shape == (0,)


def test_ids_are_mixed_as_splitmix64_does() -> None:
    def by_hand(x: int) -> int:
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return (x ^ (x >> 31)) - 2**64 * ((x ^ (x >> 31)) >= 2**63)

    draw = random.Random(0)
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), *(draw.randrange(-(2**63), 2**63) for _ in range(200))]
    assert _mixed(torch.tensor(numbers)).tolist() == [by_hand(number) for number in numbers]


def test_equal_rows_tie_whatever_rounding_makes_of_them() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.integers(0, 5, 400), rng.integers(0, 2, (400, 2)).astype(np.uint8)
    groups = rng.integers(0, 20, 400)
    clean = np.float32([[0.3, 0.1], [0.2, 0.5], [0.9, 0.4], [0.6, 0.8], [0.7, 0.2]])[rows]
    noisy = clean * (1 + rng.uniform(-2e-7, 2e-7, clean.shape)).astype(np.float32)
    assert len(np.unique(noisy)) > 10
    found = []
    for logits, size in ((clean, 400), (noisy, 64), (noisy, 7)):
        metrics = ExactMetrics(LABELS)
        for start in range(0, 400, size):
            cut = [torch.from_numpy(part[start : start + size]) for part in (logits, labels, groups, rows)]
            metrics.update(*cut)
        found.append({n: (task["auc"], task["gauc"]) for n, task in metrics.compute().items()})
    assert found[0] == found[1] == found[2]


def test_a_sample_of_groups_says_so():
    parts = fold(30_000, 3000)
    exact, bounded = measured(ExactMetrics(LABELS), parts), measured(BoundedMetrics(LABELS, 4000), parts)
    for name in LABELS:
        assert bounded[name]["gauc_share"] in (1 / 8, 1 / 16)
        assert 0 < bounded[name]["gauc_bound"] < 0.1
        assert abs(bounded[name]["gauc"] - exact[name]["gauc"]) <= bounded[name]["gauc_bound"]
        assert bounded[name]["gauc_rows"] <= 4000


@pytest.mark.parametrize("value", [math.inf, -math.inf, 3e38, 0.0])
def test_odd_logits_give_what_the_exact_measures_give(value):
    logits, labels, groups = fold(600, 20)
    logits[::7, 0] = value
    labels[:, 1] = 0  # one class
    with np.errstate(over="ignore"):
        exact = measured(ExactMetrics(LABELS), (logits, labels, groups))
    bounded = measured(BoundedMetrics(LABELS, 600), (logits, labels, groups))
    for name in LABELS:
        for key in ("logloss", "ne", "calibration", "gauc"):
            assert bounded[name][key] == pytest.approx(exact[name][key], rel=1e-12, nan_ok=True), key
    assert abs(bounded["click"]["auc"] - exact["click"]["auc"]) <= bounded["click"]["auc_bound"]
    assert math.isnan(bounded["like"]["auc"]) and math.isnan(bounded["like"]["auc_bound"])


def test_one_nan_makes_the_task_nan_and_only_it():
    logits, labels, groups = fold(600, 20)
    logits[17, 0] = math.nan
    bounded = measured(BoundedMetrics(LABELS, 600), (logits, labels, groups))
    assert all(math.isnan(bounded["click"][key]) for key in ("auc", "auc_bound", "gauc", "gauc_bound", "logloss"))
    assert not any(math.isnan(bounded["like"][key]) for key in ("auc", "auc_bound", "gauc", "logloss"))


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_labels_that_are_none_are_refused(value):
    logits, labels, groups = fold(600, 20)
    labels[3, 1] = value
    with pytest.raises(ValueError, match="label 'like' holds values that are neither 0 nor 1"):
        measured(BoundedMetrics(LABELS, 600), (logits, labels, groups))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
    """NumPy's side by tracemalloc; torch's by the tensors that are alive, which tracemalloc does not see."""

    def kept(rows: int) -> tuple[int, int]:
        gc.collect()
        before = {id(o) for o in gc.get_objects() if torch.is_tensor(o)}
        metrics = BoundedMetrics(LABELS, 2000)
        tracemalloc.start()
        for start in range(0, rows, 1000):
            metrics.update(*(torch.from_numpy(part) for part in fold(1000, 400, seed=start)))
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        tensors = [o for o in gc.get_objects() if torch.is_tensor(o) and id(o) not in before]
        return traced, sum(t.untyped_storage().nbytes() for t in tensors)

    small, large = kept(6_000), kept(60_000)
    assert large[0] < small[0] + 200_000
    assert small[1] == pytest.approx(2 * 8 * (2 * NUM_BINS + 3), rel=0.01)
    assert large[1] <= small[1] + 2000 * 10


def bounded_on_ranks(cases: list[list[int]]) -> list[tuple[np.ndarray, dict | None]]:
    """For every case of rows on each rank: where the counts of this rank, on rank 0 of all, are, and the measures."""
    start_process_group("cpu")
    rank, found = dist.get_rank(), []
    for rows_of_ranks in cases:
        first = sum(rows_of_ranks[:rank])
        mine = [part[first : first + rows_of_ranks[rank]] for part in fold(20_000, 500)]
        metrics = BoundedMetrics(LABELS, 80_000)
        for start in range(0, max(1, len(mine[0])), 300):
            metrics.update(*(torch.from_numpy(part[start : start + 300]) for part in mine))
        tasks = metrics.compute()
        found.append((counted(metrics), tasks))
    return found


def counted(metrics: BoundedMetrics) -> np.ndarray:
    counts = metrics._sums[: 4 * NUM_BINS].numpy()
    where = np.flatnonzero(counts)
    return np.stack([where, counts[where]])


def test_two_ranks_are_one():
    cases = [[10_000, 10_000], [0, 20_000], [19_999, 1]]
    first, second = run_ranks(bounded_on_ranks, 2, cases)
    one = measured(metrics := BoundedMetrics(LABELS, 80_000), fold(20_000, 500))
    assert [tasks for _, tasks in second] == [None] * 3
    for counts, two in first:
        np.testing.assert_array_equal(counts, counted(metrics))
        for name in LABELS:
            for key, value in one[name].items():
                sums = key in ("logloss", "ne", "calibration")
                assert two[name][key] == (pytest.approx(value, rel=1e-13) if sums else value), key


def test_auto_is_exact_up_to_the_rows_that_fit():
    assert fold_metrics("auto", 100, 100, LABELS).mode == "exact"
    assert fold_metrics("auto", 100, 101, LABELS).mode == "bounded"
    assert fold_metrics("exact", 100, 101, LABELS).mode == "exact"
    assert fold_metrics("bounded", 100, 1, LABELS).mode == "bounded"


@pytest.mark.slow
def test_a_run_says_how_it_measured_and_how_far_off_it_may_be(dataset, tmp_path):
    options = [f"--data.path={dataset}", "--over_arch.num_views=2", "--over_arch.view_dim=8", "--train.batch_size=64"]
    options += ["--train.eval_batch_size=50", f"--runs={tmp_path}"]
    bounded = train_job([*options, "--name=bounded", "--train.metrics=bounded", "--train.metrics_rows=100"])
    auto = train_job([*options, "--name=auto", "--train.metrics_rows=250"])  # of 301 and 205 rows
    assert [run["metrics"] for run in (bounded, auto)] == ["bounded", "exact"]
    assert "auc_bound" in auto["validation"]["click"]
    assert "auc_bound" not in auto["test"]["click"]
    for name in LABELS:
        mine, theirs = bounded["test"][name], auto["test"][name]
        assert abs(mine["auc"] - theirs["auc"]) <= mine["auc_bound"] < 1e-3
        assert mine["logloss"] == pytest.approx(theirs["logloss"], rel=1e-12)
        assert mine["gauc_share"] < 1
