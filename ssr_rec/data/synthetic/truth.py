"""Plants the truth of a synthetic log: the click and pay probabilities of any row. Formulas: docs/synthetic.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.data.synthetic.config import CATEGORY, HISTORY, ITEM, PLANTED, SyntheticConfig, products
from ssr_rec.data.synthetic.fields import (
    STREAM_OF_SPLIT,
    TRUTH_STREAM,
    Column,
    Fields,
    draw_fields,
    make_columns,
    random_stream,
    uniforms,
)

BLOCK_ROWS = 65_536
LABELS = ("click", "pay")

Kind = Literal["main", "pair", "triple", "history"]


@dataclass(frozen=True)
class DrawnRows:
    """Holds drawn rows: features, and per label the true probabilities (rows,) float64 and outcomes (rows,) int8."""

    fields: Fields
    probabilities: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class Term:
    """Gives ``weight * sum_d prod_j tables[j][id of fields[j], d]``; a history enters as the mean of its entries' rows.

    ``tables[j]`` is (ids of fields[j], latent width) float32. An empty history enters as zeros.
    """

    kind: Kind
    fields: tuple[str, ...]
    tables: tuple[np.ndarray, ...]
    weight: float = 1.0

    def __call__(self, fields: Fields) -> np.ndarray:
        """Return (rows,) float32."""
        product, *others = (_latents(fields, name, table) for name, table in zip(self.fields, self.tables, strict=True))
        for other in others:
            product = product * other
        # Column by column: unlike BLAS and `sum`, the same bits for a row whatever rows are drawn with it.
        total = product[:, 0].copy()
        for d in range(1, product.shape[1]):
            total += product[:, d]
        return total * np.float32(self.weight)


@dataclass(frozen=True)
class Truth:
    """Gives ``p_click = s(click_bias + z)`` and ``p_pay = p_click * s(pay_bias + carry * z + own)``.

    ``s`` is the logistic function, ``z`` the sum of the ``click`` terms and ``own`` that of the ``conversion`` terms.
    """

    config: SyntheticConfig
    columns: tuple[Column, ...]
    click: tuple[Term, ...]
    conversion: tuple[Term, ...]
    carry: float
    click_bias: float
    pay_bias: float

    def probabilities(self, fields: Fields) -> dict[str, np.ndarray]:
        """Return label -> (rows,) float64."""
        click_logit = _sum(self.click, fields)
        pay_logit = self.carry * click_logit + _sum(self.conversion, fields)
        p_click = _logistic(click_logit + self.click_bias)
        return {"click": p_click, "pay": p_click * _logistic(pay_logit + self.pay_bias)}


def build_truth(config: SyntheticConfig) -> Truth:
    """Draw the tables of a config's truth; one calibration block sets the terms' weights and the biases."""
    rng = random_stream(config.seed, TRUTH_STREAM)
    columns = make_columns(config)
    sample = draw_fields(columns, config, "calibration", 0, BLOCK_ROWS)
    drawn = _draw_terms(columns, config, config.num_pairs, config.num_triples, rng)
    click = _weighted(drawn, config, sample, config.signal)
    drawn = _draw_terms(columns, config, (config.num_pairs + 1) // 2, (config.num_triples + 1) // 2, rng)
    conversion = _weighted(drawn, config, sample, config.signal * math.sqrt(1 - config.carry))
    carry = math.sqrt(config.carry)
    click_logit = _sum(click, sample)
    pay_logit = carry * click_logit + _sum(conversion, sample)
    click_bias = _solve(lambda bias: _logistic(click_logit + bias), config.click_rate)
    p_click = _logistic(click_logit + click_bias)
    pay_bias = _solve(lambda bias: p_click * _logistic(pay_logit + bias), config.pay_rate)
    return Truth(config, columns, click, conversion, carry, click_bias, pay_bias)


def draw_block(truth: Truth, split: str, index: int, rows: int = BLOCK_ROWS) -> DrawnRows:
    """Return the first ``rows`` rows of block ``index`` (from 0) of a split.

    Raises:
        UserError: ``rows`` is not in [1, BLOCK_ROWS], or there is no such split.
    """
    if not 1 <= rows <= BLOCK_ROWS:
        raise UserError(f"rows={rows}: a block has 1 to {BLOCK_ROWS} rows; draw several blocks for more")
    if split not in STREAM_OF_SPLIT:
        raise UserError(f"split={split!r}: choose one of {', '.join(STREAM_OF_SPLIT)}")
    fields = draw_fields(truth.columns, truth.config, split, index, rows)
    probabilities = truth.probabilities(fields)
    chance = uniforms(truth.config.seed, split, index, "labels", rows)
    # One number decides both labels, so every pay is a click and each has its own probability exactly.
    labels = {label: (chance < probabilities[label]).astype(np.int8) for label in LABELS}
    return DrawnRows(fields, probabilities, labels)


def _draw_terms(
    columns: tuple[Column, ...], config: SyntheticConfig, num_pairs: int, num_triples: int, rng: np.random.Generator
) -> list[Term]:
    """Draw main effects of all planted features, some of all pairs and triples, and the history's terms."""
    column_of = {column.name: column for column in columns}

    def term(kind: Kind, names: tuple[str, ...], width: int) -> Term:
        return Term(kind, names, tuple(_table(column_of[name], width, rng) for name in names))

    terms = [term("main", (feature.name,), 1) for feature in PLANTED]
    pairs, triples = products(2), products(3)
    terms += [term("pair", pairs[i], config.latent_dim) for i in rng.permutation(len(pairs))[:num_pairs]]
    terms += [term("triple", triples[i], config.latent_dim) for i in rng.permutation(len(triples))[:num_triples]]
    # The same latents on both sides: entries like the shown category attract, whichever category it is.
    taste = _table(column_of[CATEGORY], config.latent_dim, rng)
    terms.append(Term("history", (HISTORY, CATEGORY), (taste, taste)))
    terms.append(term("history", (HISTORY, ITEM), config.latent_dim))
    return terms


def _table(column: Column, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return (ids, width) float32: independent normals, or for a numeric column a wave along its buckets."""
    if column.kind != "numeric":
        return rng.standard_normal((column.own.size, width), dtype=np.float32)
    position = np.linspace(0, 1, column.own.size)[:, None]
    turns, phase = rng.uniform(0.5, 1.5, width), rng.uniform(0, 1, width)
    return np.sin(2 * np.pi * (turns * position + phase)).astype(np.float32)


def _weighted(terms: list[Term], config: SyntheticConfig, sample: Fields, deviation: float) -> tuple[Term, ...]:
    """Return weights that give each kind its share of variance, its terms equal parts, and the sum ``deviation``."""
    share = {
        "main": config.main_share,
        "pair": config.pair_share,
        "triple": config.triple_share,
        "history": config.history_share,
    }
    count = {kind: sum(term.kind == kind for term in terms) for kind in share}
    weighted = [
        replace(term, weight=math.sqrt(share[term.kind] / count[term.kind]) / float(term(sample).std()))
        for term in terms
    ]
    scale = deviation / float(_sum(weighted, sample).std())
    return tuple(replace(term, weight=term.weight * scale) for term in weighted)


def _latents(fields: Fields, name: str, table: np.ndarray) -> np.ndarray:
    """Return (rows, latent width) float32."""
    if name != HISTORY:
        return table.take(fields.ids[name], axis=0)
    lengths = np.diff(fields.offsets)
    filled = np.flatnonzero(lengths)
    means = np.zeros((len(lengths), table.shape[1]), np.float32)
    if len(filled):
        # `reduceat` sums from each start to the next, which is right only once empty histories are left out.
        sums = np.add.reduceat(table.take(fields.history, axis=0), fields.offsets[filled], axis=0)
        means[filled] = sums / lengths[filled, None]
    return means


def _sum(terms: Sequence[Term], fields: Fields) -> np.ndarray:
    """Return (rows,) float64."""
    total = terms[0](fields).astype(np.float64)
    for term in terms[1:]:
        total += term(fields)
    return total


def _logistic(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def _solve(probabilities_at: Callable[[float], np.ndarray], rate: float) -> float:
    """Return the bias at which the mean probability, which grows with the bias, is ``rate``: by bisection."""
    low, high = -40.0, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probabilities_at(middle).mean() < rate else (low, middle)
    return (low + high) / 2
