"""The histogram's AUC against the exact one, within its bound on every case that could break it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ssr_rec.metrics.exact import auc
from ssr_rec.metrics.score_histogram import NUM_BINS, auc_of_histogram, bins_of

LARGEST = np.finfo(np.float32).max
ODD = np.array(
    [0.0, -0.0, np.inf, -np.inf, LARGEST, -LARGEST, 16, -16, 1e-45, -1e-45, 1e-30, 15.999999, -16.000002, 40, -90],
    dtype=np.float32,
)


def histograms(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the bins that have rows, in order: empty ones change nothing."""
    _, bins = np.unique(bins_of(torch.from_numpy(scores)).numpy(), return_inverse=True)
    return tuple(np.bincount(bins[labels == label], minlength=bins.max() + 1) for label in (1, 0))


def two_ulps(rng: np.random.Generator, rows: int) -> np.ndarray:
    centre = np.float32(rng.normal(0, 3))
    return np.where(rng.random(rows) < 0.5, centre, np.nextafter(centre, np.float32(np.inf)))


def between_edges(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Both sides of the edges of a few bins, by one ulp and by half a bin."""
    edges = (rng.integers(-200_000, 200_000, 4) / 2**16).astype(np.float32)
    offsets = np.array([0, 2**-17, -(2**-17), 2**-16], dtype=np.float32)
    scores = rng.choice(edges, rows) + rng.choice(offsets, rows)
    return np.where(rng.random(rows) < 0.3, np.nextafter(scores, np.float32(-np.inf)), scores)


DRAWS = {
    "normal": lambda rng, rows: rng.normal(-1, rng.choice([0.01, 0.3, 2, 30]), rows),
    "in one bin": lambda rng, rows: 0.25 + rng.random(rows) * 2.0**-17,
    "in two ulps": two_ulps,
    "between edges": between_edges,
    "equal": lambda rng, rows: np.full(rows, rng.choice(ODD)),
    "ties": lambda rng, rows: np.round(rng.normal(0, 2, rows)),
    "odd": lambda rng, rows: rng.choice(ODD, rows),
    "any bits": lambda rng, rows: rng.integers(0, 2**32, rows, dtype=np.uint32).view(np.float32),
    "around the ends": lambda rng, rows: rng.choice([-16, 16], rows) * (1 + rng.normal(0, 1e-6, rows)),
    "huge": lambda rng, rows: rng.normal(0, 1e38, rows).clip(-LARGEST, LARGEST),
}


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Case ``number``: scores without nan, and labels that depend on them more, less, or the wrong way."""
    rng = np.random.default_rng(number)
    rows = int(rng.choice([1, 2, 17, 17, 300, 300, 3000]))
    scores = list(DRAWS.values())[number % len(DRAWS)](rng, rows).astype(np.float32)
    scores = np.where(np.isnan(scores), np.float32(0), scores)
    ranks = np.argsort(np.argsort(scores, kind="stable")) / rows
    rate = rng.choice([0.5, 0.02, 0.999, 0.0, 1.0], p=[0.4, 0.3, 0.2, 0.05, 0.05])  # skew, and folds of one class
    slope = rng.choice([0.0, 0.5, 1.0, -1.0])
    labels = rng.random(rows) < (rate if rate in (0.0, 1.0) else rate + slope * min(rate, 1 - rate) * (2 * ranks - 1))
    return scores, labels.astype(np.uint8)


@pytest.mark.parametrize("kind", range(len(DRAWS)), ids=list(DRAWS))
def test_no_case_is_further_from_the_exact_auc_than_its_bound(kind):
    compared = 0
    for number in range(kind, 1000, len(DRAWS)):
        scores, labels = draw(number)
        found = auc_of_histogram(*histograms(scores, labels))
        exact = auc(scores, labels)
        if math.isnan(exact):
            assert math.isnan(found.value) and math.isnan(found.bound)
            continue
        assert abs(found.value - exact) <= found.bound, f"case {number}"
        assert 0 < found.bound <= 0.5 + 1e-9
        compared += 1
    assert compared >= 40


def test_the_bound_is_reached_and_is_the_sum_over_bins_of_pairs():
    scores = np.array([0.25, np.nextafter(np.float32(0.25), np.float32(1)), 3.0, 3.00001], dtype=np.float32)
    found = auc_of_histogram(*histograms(scores, np.array([0, 1, 0, 1])))
    # Right are 3 of the 4 pairs; the two within a bin count half.
    assert auc(scores, np.array([0, 1, 0, 1])) == 0.75
    assert found.value == (2 * 0.5 + 1) / 4
    assert found.bound == pytest.approx(2 / (2 * 4), abs=1e-15)


def test_apart_by_more_than_a_bin_is_exact_to_the_bit():
    rng = np.random.default_rng(0)
    scores = rng.permutation(np.arange(20_000, dtype=np.float32) / 2**10 - 9)
    labels = (rng.random(20_000) < 0.1).astype(np.uint8)
    found = auc_of_histogram(*histograms(scores, labels))
    assert found.value == auc(scores, labels)
    assert found.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.bound < 1e-15


def test_bins_never_fall_as_the_score_rises():
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 400_000, dtype=np.uint32).view(np.float32)
    edges = np.arange(-2100, 2100, dtype=np.float32) / 128
    near = np.concatenate([np.nextafter(edges, np.float32(side)) for side in (-np.inf, np.inf)])
    scores = np.sort(np.concatenate([bits[~np.isnan(bits)], rng.normal(0, 5, 400_000), near, edges, ODD]))
    scores = scores.astype(np.float32)
    bins = bins_of(torch.from_numpy(scores)).numpy()
    assert (np.diff(bins) >= 0).all()
    assert bins[0] == 0 and bins[-1] == NUM_BINS - 1
    # Narrow where logits lie: neighbours a 2**-15 apart are never together.
    middle = np.unique(np.round(rng.uniform(-16, 16, 100_000) * 2**15) / 2**15).astype(np.float32)
    middle = middle[np.abs(middle) < 16]
    assert (np.diff(bins_of(torch.from_numpy(middle)).numpy()) > 0).all()
    # And a nan is at least within the histogram.
    assert 0 <= int(bins_of(torch.tensor([math.nan]))) < NUM_BINS


def test_zeros_of_both_signs_are_one_score():
    assert len(set(bins_of(torch.tensor([0.0, -0.0])).tolist())) == 1


def test_pairs_beyond_64_bits_are_counted_exactly():
    """Trillions of rows: 2 * P * N no longer fits an int64."""
    rng = np.random.default_rng(3)
    positives, negatives = rng.integers(0, 2**42, 200), rng.integers(0, 2**42, 200)
    below, right, tied = 0, Fraction(0), 0
    for p, n in zip(positives.tolist(), negatives.tolist(), strict=True):
        right += p * below + Fraction(p * n, 2)
        tied += p * n
        below += n
    pairs = sum(positives.tolist()) * below
    found = auc_of_histogram(positives, negatives)
    assert found.value == float(right / pairs)
    assert found.bound == pytest.approx(float(Fraction(tied, 2 * pairs)), abs=1e-15)
