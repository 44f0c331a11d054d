"""Ids of the synthetic log: frequencies, attributes of users and items, histories, and refused configs."""

import math
from typing import Any

import numpy as np
import pytest

from ssr_rec.data.synthetic.config import NUM_PLANTED, SyntheticConfig
from ssr_rec.data.synthetic.fields import Distribution
from ssr_rec.data.synthetic.truth import BLOCK_ROWS, DrawnRows, Truth, build_truth, draw_block


@pytest.fixture(scope="module")
def truth() -> Truth:
    return build_truth(SyntheticConfig())


@pytest.fixture(scope="module")
def block(truth: Truth) -> DrawnRows:
    return draw_block(truth, "train", 2)


def expected_counts(weights: np.ndarray, rows: int) -> np.ndarray:
    return weights / weights.sum() * rows


@pytest.mark.parametrize(
    ("name", "size", "exponent"), [("user_id", 20_000, 0.5), ("item_id", 20_000, 1.1), ("page", 200, 1.1)]
)
def test_ids_have_zipf_frequencies(truth: Truth, name: str, size: int, exponent: float) -> None:
    ids = np.concatenate([draw_block(truth, "train", index).fields.ids[name] for index in range(2)])
    counts = np.bincount(ids, minlength=size)
    assert len(counts) == size
    expected = expected_counts(np.arange(1, size + 1) ** -exponent, len(ids))
    # Ranks are pooled by powers of two, so that every pool is large enough for a chi-square.
    pools = np.unique(np.round(np.geomspace(1, size, 15)).astype(int)) - 1
    seen, due = np.add.reduceat(counts, pools[:-1]), np.add.reduceat(expected, pools[:-1])
    assert ((seen - due) ** 2 / due).sum() < len(due) + 5 * math.sqrt(2 * len(due))


def test_numeric_buckets_are_bell_shaped_and_their_effect_smooth(truth: Truth) -> None:
    price = next(column for column in truth.columns if column.name == "item_price")
    counts = np.bincount(price.own(np.random.default_rng(0).random(100_000, dtype=np.float32)), minlength=50)
    weights = np.exp(-(np.linspace(-2.5, 2.5, 50) ** 2) / 2)
    np.testing.assert_allclose(counts / 100_000, weights / weights.sum(), atol=0.003)


def test_effects_of_numeric_buckets_are_smooth_and_not_all_monotone(truth: Truth) -> None:
    numeric = {"item_price", "user_tenure"}
    tables = [table for t in truth.click for name, table in zip(t.fields, t.tables, strict=True) if name in numeric]
    turning_points = []
    for effect in (column for table in tables for column in table.T):
        steps = np.diff(effect)
        assert np.abs(steps).max() < 0.2
        turning_points.append(np.count_nonzero(np.diff(np.sign(steps))))
    assert 0 < max(turning_points) <= 3


def test_distribution_inverts_the_cumulative_sum() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 1_000, 100_000):
        weights = rng.random(size) ** 4 + 1e-9
        u = np.append(rng.random(20_000, dtype=np.float32), np.array([0, 1 - 2**-24, 1], np.float32))
        inner = np.cumsum(weights / weights.sum()).astype(np.float32)[:-1]
        np.testing.assert_array_equal(Distribution(weights)(u), np.searchsorted(inner, u, side="right"))


def test_attributes_follow_their_user_and_item(block: DrawnRows) -> None:
    ids = block.fields.ids
    for parent, attribute in (("user_id", "user_city"), ("item_id", "item_shop"), ("item_id", "item_price")):
        rows = ids[parent] == np.bincount(ids[parent]).argmax()
        assert np.bincount(ids[attribute][rows]).max() / rows.sum() == pytest.approx(0.9, abs=0.15)
    left, right = ids["context_noise_00"], ids["context_noise_02"]
    np.testing.assert_array_equal(ids["cross_noise_04"], (left * 7_919 + right) % 63)


def test_noise_attributes_share_nothing_with_the_planted_ones(truth: Truth) -> None:
    tables = {column.name: column.of_parent for column in truth.columns if column.of_parent is not None}
    for planted, noise in (("user_segment", "user_noise_01"), ("item_category", "item_noise_03")):
        assert abs(np.corrcoef(np.log1p(tables[planted]), np.log1p(tables[noise]))[0, 1]) < 0.03


def test_histories_have_geometric_lengths_and_a_favourite(truth: Truth, block: DrawnRows) -> None:
    lengths = np.diff(block.fields.offsets)
    expected = 0.85 ** np.arange(21)
    np.testing.assert_allclose(np.bincount(lengths) / BLOCK_ROWS, expected / expected.sum(), atol=0.006)
    column = next(column for column in truth.columns if column.name == "history")
    owners = np.repeat(block.fields.ids["user_id"], lengths)
    assert column.of_parent is not None
    assert 0.5 < (block.fields.history == column.of_parent[owners]).mean() < 0.6
    zipf = np.arange(1, 401) ** -1.1
    others = block.fields.history[block.fields.history != column.of_parent[owners]]
    assert np.bincount(others, minlength=400)[1:3] / len(others) == pytest.approx((zipf / zipf.sum())[1:3], abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_fields": NUM_PLANTED - 1}, f"num_fields=14: the truth has {NUM_PLANTED}; ask for at least"),
        ({"num_pairs": 66}, "num_pairs=66: there are 65"),
        ({"num_triples": 101}, "num_triples=101: there are 100"),
        ({"pay_rate": 0.3}, "pay_rate=0.3: every pay is a click; set it below 0.25"),
        ({"train_rows": 0}, "train_rows\n.*greater than or equal to 1"),
        ({"test_rows": -5}, "test_rows\n.*greater than or equal to 1"),
        ({"rows": 5}, "rows\n.*Extra inputs"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**change)
