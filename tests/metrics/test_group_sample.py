"""Sampled GAUC against the exact one, and the sample against plain filtering of the whole fold."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ssr_rec.metrics.exact import gauc
from ssr_rec.metrics.group_sample import GroupSample, hashes, sampled_gauc
from ssr_rec.training.setup import start_process_group
from tests.ranks import run_ranks


def fold(rows: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two tasks; groups of uneven sizes whose labels some predict better than others."""
    rng = np.random.default_rng(seed)
    group = (groups * rng.random(rows) ** 2).astype(np.int64) * 1_000_003 - 5
    sharpness = 1 + np.sin(group.astype(float))
    logits = rng.normal(0, 1, (rows, 2)).astype(np.float32)
    labels = rng.random((rows, 2)) < 1 / (1 + np.exp(-sharpness[:, None] * logits))
    return logits, labels.astype(np.float32), group


def sampled(fold: tuple[np.ndarray, ...], max_rows: int, batch: int = 257) -> tuple[GroupSample, tuple]:
    sample = GroupSample(max_rows)
    for start in range(0, len(fold[0]), batch):
        sample.update(*(torch.from_numpy(part[start : start + batch]) for part in fold))
        assert sample.num_rows <= max_rows
    return sample, sample.gather()


def sorted_rows(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    rows = np.column_stack([groups, logits, labels])
    return rows[np.lexsort(rows.T)]


def splitmix64(value: int) -> int:
    """The finaliser, written out in integers of any size."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_the_published_one_and_spreads():
    ids = np.array([0, 1, -1, 2**62, -(2**63)])
    assert hashes(ids).tolist() == [splitmix64(value % 2**64) for value in ids.tolist()]
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first output from seed 0
    neighbours = hashes(np.arange(1 << 16)) >> np.uint64(60)
    assert np.abs(np.bincount(neighbours.astype(int), minlength=16) / 4096 - 1).max() < 0.1


def test_what_fits_is_kept_and_gauc_is_exact():
    whole = fold(5000, 300)
    sample, (logits, labels, groups) = sampled(whole, max_rows=5000)
    assert sample.share == 1.0 and len(groups) == 5000
    found, exact = sampled_gauc(logits[:, 1], labels[:, 1], groups, 1.0), gauc(whole[0][:, 1], whole[1][:, 1], whole[2])
    assert (found.value, found.groups, found.rows) == exact
    assert found.bound == 0.0


@pytest.mark.parametrize("max_rows", [4999, 1000, 100])
def test_the_sample_is_all_rows_of_the_groups_with_small_hashes(max_rows):
    whole = fold(5000, 300)
    sample, kept = sampled(whole, max_rows, batch=10)  # 500 pieces: they are joined on the way
    assert len(sample._pieces) <= 257
    wanted = [splitmix64(int(group) % 2**64) < 2 ** (64 - sample.halvings) for group in whole[2]]
    assert sum(wanted) == len(kept[2]) <= max_rows
    np.testing.assert_array_equal(sorted_rows(*kept), sorted_rows(*(part[wanted] for part in whole)))
    fewer = [splitmix64(int(group) % 2**64) < 2 ** (65 - sample.halvings) for group in whole[2]]
    assert sum(fewer) > max_rows, "no more groups are left out than must be"


def test_the_interval_holds_as_often_as_it_says():
    """Exact GAUC of 2,000 groups against that of samples of 1/2 to 1/16 of them; ids drawn anew, so the samples are."""
    misses, cases, widths = 0, 0, []
    for seed in range(50):
        logits, labels, group = fold(20_000, 2000, seed)
        ids = np.random.default_rng(seed).integers(-(2**62), 2**62, 2000)[group // 1_000_003]
        exact = gauc(logits[:, 0], labels[:, 0], group).value
        for halvings in (1, 2, 3, 4):
            chosen = hashes(ids) >> np.uint64(64 - halvings) == 0
            found = sampled_gauc(logits[chosen, 0], labels[chosen, 0], ids[chosen], 2.0**-halvings)
            misses += abs(found.value - exact) > found.bound
            cases += 1
            widths.append(found.bound)
    assert misses <= 0.02 * cases, f"{misses} of {cases}"  # .3 % for normal errors
    assert 0.002 < np.median(widths) < 0.05, "an interval that says something"


SIZES = {
    "even": lambda rng: rng.integers(2, 20, 1500),
    "pareto": lambda rng: np.minimum(2 + (3 * rng.pareto(1.1, 1500)).astype(int), 30_000),
    "zipf": lambda rng: np.maximum(2, 6000 // np.arange(1, 1501)),
    "one of 30,000 rows": lambda rng: np.append(rng.integers(2, 20, 1500), 30_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("harder", [False, True], ids=["alike", "larger are harder"])
@pytest.mark.parametrize("kind", SIZES)
def test_the_interval_holds_for_uneven_groups(kind: str, harder: bool) -> None:
    """One fold, its groups named anew 60 times, so that other ones are left out; half and an eighth are sampled."""
    rng = np.random.default_rng(5)
    sizes = SIZES[kind](rng)
    group = np.repeat(np.arange(len(sizes)), sizes)
    sharpness = np.where(harder, 2.5 / (1 + np.log(sizes)), 1.0)[group]
    logits = rng.normal(0, 1, (len(group), 1)).astype(np.float32)
    labels = (rng.random(len(group)) < 1 / (1 + np.exp(-sharpness * logits[:, 0]))).astype(np.float32)[:, None]
    exact = gauc(logits[:, 0], labels[:, 0], group).value
    misses, plain, widths = 0, 0, []
    for seed in range(60):
        named = np.random.default_rng(seed).integers(-(2**62), 2**62, len(sizes))[group]
        for halvings in (1, 3):
            sample = GroupSample(len(group))
            sample.halvings = halvings
            sample.update(*(torch.from_numpy(part) for part in (logits, labels, named)))
            kept = sample.gather()
            assert kept is not None
            args = (kept[0][:, 0], kept[1][:, 0], kept[2], sample.share)
            found = sampled_gauc(*args, *sample.rest(0))
            misses += abs(found.value - exact) > found.bound
            plain += abs(found.value - exact) > sampled_gauc(*args).bound
            widths.append(found.bound)
    assert misses <= 2, f"{misses} of 120; {plain} if large groups are not counted"
    if kind == "even":
        assert np.median(widths) < 0.05, "an interval that says something"
    if kind.startswith("one") and harder:
        assert plain > 20, "the case is one that the spread in the sample does not show"


def test_few_groups_have_no_interval_and_none_no_value():
    logits, labels, groups = fold(400, 20)
    found = sampled_gauc(logits[:, 0], labels[:, 0], groups, 0.5)
    assert math.isnan(found.bound) and not math.isnan(found.value)
    assert sampled_gauc(logits[:, 0], np.zeros(400), groups, 0.5)[2:] == (0, 0)
    one_group = (logits, labels, np.zeros(400, np.int64))
    sample, kept = sampled(one_group, max_rows=399)
    assert len(kept[2]) == 0 and sample.num_rows == 0
    assert math.isnan(sampled_gauc(kept[0][:, 0], kept[1][:, 0], kept[2], sample.share).value)


def gather_on_ranks(rows_of_ranks: tuple[int, int], max_rows: int) -> tuple[int, tuple | None]:
    start_process_group("cpu")
    first = sum(rows_of_ranks[: dist.get_rank()])
    mine = [part[first : first + rows_of_ranks[dist.get_rank()]] for part in fold(5000, 300)]
    sample = GroupSample(max_rows)
    for start in range(0, max(1, len(mine[0])), 100):
        sample.update(*(torch.from_numpy(part[start : start + 100]) for part in mine))
    return sample.halvings, sample.gather()


@pytest.mark.parametrize("rows_of_ranks", [(2500, 2500), (4600, 400), (5000, 0)])
def test_ranks_agree_on_the_groups(tmp_path: Path, rows_of_ranks: tuple[int, int]):
    """Rows of a group lie on both ranks; the rank with more rows decides which groups are left out."""
    (first, kept), (second, nothing) = run_ranks(gather_on_ranks, 2, rows_of_ranks, 700)
    assert nothing is None
    whole = fold(5000, 300)
    wanted = hashes(whole[2]) >> np.uint64(64 - max(first, second)) == 0
    assert 0 < wanted.sum() < 5000
    np.testing.assert_array_equal(sorted_rows(*kept), sorted_rows(*(part[wanted] for part in whole)))
