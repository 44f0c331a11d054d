"""The planted truth: reproducible blocks, probabilities that are what the formula says, labels that follow them."""

import math

import numpy as np
import pytest

from ssr_rec.data.synthetic.config import PLANTED, SyntheticConfig
from ssr_rec.data.synthetic.truth import BLOCK_ROWS, DrawnRows, Term, Truth, build_truth, draw_block

GROUPS = {feature.name: feature.group for feature in PLANTED}


@pytest.fixture(scope="module")
def truth() -> Truth:
    return build_truth(SyntheticConfig())


@pytest.fixture(scope="module")
def block(truth: Truth) -> DrawnRows:
    return draw_block(truth, "train", 2)


def assert_same_rows(block: DrawnRows, longer: DrawnRows, rows: int) -> None:
    for name, ids in block.fields.ids.items():
        np.testing.assert_array_equal(ids, longer.fields.ids[name][:rows], err_msg=name)
    np.testing.assert_array_equal(block.fields.offsets, longer.fields.offsets[: rows + 1])
    np.testing.assert_array_equal(block.fields.history, longer.fields.history[: block.fields.offsets[-1]])
    for label in ("click", "pay"):
        np.testing.assert_array_equal(block.labels[label], longer.labels[label][:rows])
        np.testing.assert_array_equal(block.probabilities[label], longer.probabilities[label][:rows])


def test_a_block_is_the_same_alone_in_another_order_and_in_part(truth: Truth, block: DrawnRows) -> None:
    other = build_truth(truth.config)
    draw_block(other, "test", 7, 10)
    assert_same_rows(draw_block(other, "train", 2), block, BLOCK_ROWS)
    for rows in (1, 2, 1_001, 40_003):
        assert_same_rows(draw_block(other, "train", 2, rows), block, rows)


def test_blocks_splits_seeds_and_columns_differ(truth: Truth, block: DrawnRows) -> None:
    def shown(one: DrawnRows) -> np.ndarray:
        return one.fields.ids["user_id"][:1_000]

    others = [draw_block(truth, "train", 3, 1_000), draw_block(truth, "test", 2, 1_000)]
    others.append(draw_block(build_truth(SyntheticConfig(seed=1)), "train", 2, 1_000))
    for other in others:
        assert (shown(other) == shown(block)).mean() < 0.01
    noise = block.fields.ids["context_noise_20"], block.fields.ids["context_noise_22"]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.02


def test_more_noise_fields_leave_the_rows_alone(truth: Truth, block: DrawnRows) -> None:
    wider = draw_block(build_truth(SyntheticConfig(num_fields=60)), "train", 2, 500)
    for name in GROUPS:
        np.testing.assert_array_equal(wider.fields.ids[name], block.fields.ids[name][:500])
    np.testing.assert_array_equal(wider.labels["pay"], block.labels["pay"][:500])


def term_by_hand(term: Term, block: DrawnRows, row: int) -> float:
    total = 0.0
    for d in range(term.tables[0].shape[1]):
        product = 1.0
        for name, table in zip(term.fields, term.tables, strict=True):
            if name == "history":
                start, end = block.fields.offsets[row], block.fields.offsets[row + 1]
                entries = [float(table[i, d]) for i in block.fields.history[start:end]]
                product *= sum(entries) / len(entries) if entries else 0.0
            else:
                product *= float(table[block.fields.ids[name][row], d])
        total += product
    return term.weight * total


def test_probabilities_equal_the_formula_row_by_row(truth: Truth, block: DrawnRows) -> None:
    lengths = np.diff(block.fields.offsets)
    rows = [*range(150), *np.flatnonzero(lengths == 0)[:5], *np.flatnonzero(lengths == 20)[:5], BLOCK_ROWS - 1]
    for row in rows:
        z = sum(term_by_hand(term, block, row) for term in truth.click)
        own = sum(term_by_hand(term, block, row) for term in truth.conversion)
        click = 1 / (1 + math.exp(-(truth.click_bias + z)))
        pay = click / (1 + math.exp(-(truth.pay_bias + truth.carry * z + own)))
        assert block.probabilities["click"][row] == pytest.approx(click, abs=1e-6)
        assert block.probabilities["pay"][row] == pytest.approx(pay, abs=1e-6)


def test_terms_are_what_the_config_asks(truth: Truth) -> None:
    by_kind: dict[str, list[Term]] = {}
    for term in truth.click:
        by_kind.setdefault(term.kind, []).append(term)
    assert [term.fields[0] for term in by_kind["main"]] == [feature.name for feature in PLANTED]
    assert {kind: len(terms) for kind, terms in by_kind.items()} == {"main": 14, "pair": 14, "triple": 6, "history": 2}
    for term in by_kind["pair"] + by_kind["triple"]:
        assert len({GROUPS[name] for name in term.fields}) == len(term.fields)
        assert all(table.shape[1] == 4 for table in term.tables)
    assert len({term.fields for term in by_kind["pair"] + by_kind["triple"]}) == 20
    assert by_kind["history"][0].tables[0] is by_kind["history"][0].tables[1]


def test_variance_follows_the_shares(truth: Truth) -> None:
    fields = draw_block(truth, "calibration", 0).fields
    total = np.sum([term(fields) for term in truth.click], axis=0, dtype=np.float64)
    assert total.std() == pytest.approx(1.35, rel=1e-4)
    parts: dict[str, float] = {}
    for term in truth.click:
        parts[term.kind] = parts.get(term.kind, 0) + float(term(fields).var())
    shares = {kind: part / sum(parts.values()) for kind, part in parts.items()}
    assert shares == pytest.approx({"main": 0.30, "pair": 0.40, "triple": 0.15, "history": 0.15}, abs=1e-3)
    conversion = np.sum([term(fields) for term in truth.conversion], axis=0, dtype=np.float64)
    assert truth.carry**2 * total.var() / 1.35**2 == pytest.approx(0.25, rel=1e-3)
    assert conversion.var() / 1.35**2 == pytest.approx(0.75, rel=1e-3)


def test_labels_follow_the_probabilities(truth: Truth) -> None:
    blocks = [draw_block(truth, "train", index) for index in range(6)]
    for label, rate in (("click", 0.25), ("pay", 0.04)):
        p = np.concatenate([b.probabilities[label] for b in blocks])
        y = np.concatenate([b.labels[label] for b in blocks])
        assert p.mean() == pytest.approx(rate, rel=0.03)
        for decile in np.array_split(np.argsort(p), 10):
            deviation = math.sqrt((p[decile] * (1 - p[decile])).sum())
            assert abs(y[decile].sum() - p[decile].sum()) < 4.5 * deviation
    for b in blocks:
        assert not (b.labels["pay"] & ~b.labels["click"] & 1).any()
        assert (b.probabilities["pay"] < b.probabilities["click"]).all()


def test_conversion_is_independent_of_luck_in_the_click(truth: Truth) -> None:
    """Among clicks, pays come at p_pay / p_click: one number deciding both labels must not bias them."""
    b = draw_block(truth, "train", 0)
    clicked = b.labels["click"] == 1
    p = (b.probabilities["pay"] / b.probabilities["click"])[clicked]
    assert abs(b.labels["pay"][clicked].sum() - p.sum()) < 4.5 * math.sqrt((p * (1 - p)).sum())


def test_draw_block_refuses_what_does_not_exist(truth: Truth) -> None:
    with pytest.raises(ValueError, match=r"rows=0: a block has 1 to 65536 rows"):
        draw_block(truth, "train", 0, 0)
    with pytest.raises(ValueError, match=r"split='dev': choose one of train, validation, test"):
        draw_block(truth, "dev", 0)
