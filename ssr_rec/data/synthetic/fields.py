"""Draws the features of a synthetic log: Zipf ids, attributes of users and items, histories, noise.

Every column has its own random stream keyed by ``(seed, split, block, column)``. So any block can be drawn alone,
its first rows do not depend on how many are asked, and a column does not move when another is added.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ssr_rec.data.synthetic.config import CATEGORY, HISTORY, ITEM, PLANTED, USER, SyntheticConfig

STREAM_OF_SPLIT = {"train": 0, "validation": 1, "test": 2, "calibration": 3}
"""The calibration rows belong to no split: they set the weights and biases of the truth."""

PLANTED_STREAM, NOISE_STREAM, TRUTH_STREAM = 4, 5, 6
"""Apart, so that the truth and its features stay the same with more or less noise."""

_HISTORY_DECAY = 0.85
_SMALLEST_NOISE = 20
_NOISE_GROUPS = ("context", "user", "context", "item", "cross")

Kind = Literal["categorical", "numeric", "list"]


class Distribution:
    """Draws from a distribution over the ids [0, size) by inverting its cumulative sum.

    A table over equal cells of [0, 1) answers most draws; only cells that hold a boundary between ids need the
    binary search, which is several times slower.
    """

    CELLS = 65_536

    def __init__(self, weights: np.ndarray) -> None:
        self.size = len(weights)
        self._cumulative = np.cumsum(weights / weights.sum()).astype(np.float32)
        self._cumulative[-1] = np.inf  # rounding must not push a draw past the last id
        edges = np.arange(self.CELLS + 1, dtype=np.float32) / self.CELLS
        self._at_edge = np.searchsorted(self._cumulative, edges, side="right")

    def __call__(self, uniforms: np.ndarray) -> np.ndarray:
        """Map (n,) float32 in [0, 1) to ids (n,) int64."""
        cell = np.minimum((uniforms * np.float32(self.CELLS)).astype(np.int64), self.CELLS - 1)
        ids = self._at_edge.take(cell)
        unsure = np.flatnonzero(ids != self._at_edge.take(cell + 1))
        ids[unsure] = np.searchsorted(self._cumulative, uniforms[unsure], side="right")
        return ids


@dataclass(frozen=True)
class Column:
    """Says how the ids of a feature are drawn.

    With ``parent`` (the user or item column) an id is ``of_parent[parent's id]`` in a share ``fidelity`` of the
    draws and else drawn from ``own``. With ``crossed`` it is a hash of two other columns and ``own`` only gives
    the number of ids.
    """

    name: str
    kind: Kind
    own: Distribution
    parent: str | None = None
    of_parent: np.ndarray | None = None
    fidelity: float = 0.0
    crossed: tuple[str, str] | None = None

    def draw(self, uniforms: np.ndarray, parent_ids: np.ndarray | None) -> np.ndarray:
        """Map (n,) float32 in [0, 1), and the (n,) ids of the parent where there is one to ids (n,) int64."""
        if self.of_parent is None or parent_ids is None:
            return self.own(uniforms)
        ids = self.of_parent.take(parent_ids)
        # What a uniform has left above the fidelity is uniform again: one number decides both.
        free = np.flatnonzero(uniforms >= self.fidelity)
        ids[free] = self.own((uniforms[free] - np.float32(self.fidelity)) / np.float32(1 - self.fidelity))
        return ids


@dataclass(frozen=True)
class Fields:
    """Holds drawn features: ``ids[name]`` (rows,) int64; row i's history is ``history[offsets[i]:offsets[i + 1]]``."""

    ids: dict[str, np.ndarray]
    history: np.ndarray
    offsets: np.ndarray


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """Return a generator that shares nothing with those of other keys."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def uniforms(seed: int, split: str, index: int, stream: str, count: int) -> np.ndarray:
    """Return the first ``count`` numbers of a block's stream, float32 in [0, 1)."""
    key = (STREAM_OF_SPLIT[split], index, zlib.crc32(stream.encode()))
    return random_stream(seed, *key).random(count, dtype=np.float32)


def draw_fields(columns: tuple[Column, ...], config: SyntheticConfig, split: str, index: int, rows: int) -> Fields:
    """Return the features of the first ``rows`` rows of a block; parents come before their columns."""
    ids: dict[str, np.ndarray] = {}
    history = offsets = np.zeros(1, np.int64)
    for column in columns:
        if column.kind == "list":
            lengths = history_lengths(config)(uniforms(config.seed, split, index, "history length", rows))
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            owners = np.repeat(ids[USER], lengths)
            history = column.draw(uniforms(config.seed, split, index, column.name, len(owners)), owners)
        elif column.crossed is not None:
            left, right = (ids[name] for name in column.crossed)
            ids[column.name] = (left * 7_919 + right) % column.own.size
        else:
            parent_ids = ids[column.parent] if column.parent else None
            ids[column.name] = column.draw(uniforms(config.seed, split, index, column.name, rows), parent_ids)
    return Fields(ids, history, offsets)


def history_lengths(config: SyntheticConfig) -> Distribution:
    """Draw geometric lengths, cut at the longest: most histories are short, about one in seven is empty."""
    return Distribution(_HISTORY_DECAY ** np.arange(config.history_length + 1))


def make_columns(config: SyntheticConfig) -> tuple[Column, ...]:
    """Return the planted features, the history, then the noise."""
    rng = random_stream(config.seed, PLANTED_STREAM)
    num_of = {"user": config.users, "item": config.items}
    columns: list[Column] = []
    for name, group, kind, most_ids in PLANTED:
        if most_ids is None:
            exponent = config.user_zipf if name == USER else config.zipf
            columns.append(Column(name, kind, Distribution(_zipf(num_of[group], exponent))))
        else:
            size = min(most_ids, num_of.get(group, most_ids))
            own = Distribution(_bell(size) if kind == "numeric" else _zipf(size, config.zipf))
            columns.append(_attribute(name, group, kind, own, config, rng))
    categories = next(column.own for column in columns if column.name == CATEGORY)
    favourites = categories(rng.random(config.users, dtype=np.float32))
    columns.append(Column(HISTORY, "list", categories, USER, favourites, config.loyalty))
    return (*columns, *_noise(config))


def _attribute(
    name: str, group: str, kind: Kind, own: Distribution, config: SyntheticConfig, rng: np.random.Generator
) -> Column:
    if group == "context":
        return Column(name, kind, own)
    parent, num_parents = (USER, config.users) if group == "user" else (ITEM, config.items)
    return Column(name, kind, own, parent, own(rng.random(num_parents, dtype=np.float32)), config.fidelity)


def _noise(config: SyntheticConfig) -> list[Column]:
    """Return fields the truth does not look at, of the same make as those it does, and crosses of two of them."""
    rng = random_stream(config.seed, NOISE_STREAM)
    count = config.num_fields - len(PLANTED) - 1
    largest = max(config.users, config.items)
    sizes = np.geomspace(min(_SMALLEST_NOISE, largest), largest, count).round().astype(int)
    columns: list[Column] = []
    for number, size in enumerate(sizes.tolist()):
        group = _NOISE_GROUPS[number % len(_NOISE_GROUPS)]
        name = f"{group}_noise_{number:02d}"
        own = Distribution(_zipf(size, config.zipf))
        if group == "cross":
            columns.append(Column(name, "categorical", own, crossed=(columns[-4].name, columns[-2].name)))
        else:
            columns.append(_attribute(name, group, "categorical", own, config, rng))
    return columns


def _zipf(size: int, exponent: float) -> np.ndarray:
    return np.arange(1, size + 1, dtype=np.float64) ** -exponent


def _bell(size: int) -> np.ndarray:
    """Return bucket weights of a numeric value: few rows in the first and last buckets, many in the middle."""
    return np.exp(-0.5 * np.linspace(-2.5, 2.5, size) ** 2)
