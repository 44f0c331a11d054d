"""Defines what bench_inference.py measures: a model served in one mode, and the requests that are put to it.

All modes get the same thing, prepared ids as a ``KeyedJaggedTensor`` lays them out, ``(values, lengths)``:

- ``eager``: the trainer's model as it is, on one process: ``KeyedJaggedTensor`` through ``EmbeddingBagCollection`` and
  the eager over-arch. The ``KeyedJaggedTensor`` is made anew for every request: one keeps what it has computed.
- ``compiled``: the same with everything but the tables under ``torch.compile``. To compile the lookups of 44 tables as
  well took two minutes and made them slower (2026-11-22).
- ``aot``: the exported artifact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.tables import initialise_tables
from ssr_rec.model.ctr_model import CTRModel
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import build_plain_model, restore_model

MODES = ("eager", "compiled", "aot")
Score = Callable[[Tensor, Tensor], Tensor]
"""(values, lengths) of B rows to logits (B, T)."""


@dataclass(frozen=True)
class Case:
    """Describes one model in one mode; a process of its own serves it.

    Attributes:
        model: the over-arch, as tables and pictures name it.
        label: which of the model's forms this is.
        source: a run folder, or an artifact's; None for untrained weights.
        config: what is built where there is no source.
        schema: of the rows, as in the run or the artifact.
        data: the prepared log whose test fold the rows are; None draws ids.
        raw: raw rows go in, as mappings or as an Arrow table, and probabilities come out; empty: prepared ids go in.
        fixed: figures about the model that need not be measured.
    """

    model: str
    label: str
    mode: str
    threads: int
    schema: Schema
    source: Path | None = None
    config: RunConfig | None = None
    data: Path | None = None
    raw: Literal["", "mappings", "Arrow"] = ""
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.label}"


@dataclass(frozen=True)
class Rows:
    """Holds N rows: per feature its ids row after row, and (N + 1,) offsets into them; labels (N, T) or None."""

    ids: list[np.ndarray]
    offsets: list[np.ndarray]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets[0]) - 1

    def request(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return rows start .. stop as ``(values, lengths (F * B,))``, feature after feature."""
        parts = [ids[at[start] : at[stop]] for ids, at in zip(self.ids, self.offsets, strict=True)]
        lengths = [np.diff(at[start : stop + 1]) for at in self.offsets]
        return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(np.concatenate(lengths))


def draw_rows(schema: Schema, count: int, seed: int) -> Rows:
    """Return rows of uniform ids; lists of uniform lengths from none to the longest."""
    rng = np.random.default_rng(seed)
    ids, offsets = [], []
    for feature in schema.features:
        lengths = np.ones(count, np.int64)
        if feature.max_length is not None:
            lengths = rng.integers(0, feature.max_length + 1, count)
        offsets.append(np.concatenate(([0], np.cumsum(lengths))))
        ids.append(rng.integers(0, feature.num_embeddings, int(lengths.sum())))
    return Rows(ids, offsets)


def read_rows(folder: Path, schema: Schema, count: int | None = None) -> Rows:
    """Return the first rows of a prepared log's test fold, in the order they are stored; None: all.

    Raises:
        ValueError: see ``Reader``.
    """
    size = min(count or schema.splits["test"].num_rows, schema.splits["test"].num_rows)
    reader = Reader(folder, schema, "test", batch_size=max(1, size), num_lanes=1).reading(prefetch=1)
    batches = reader.epoch(0)
    try:
        batch = next(batches)
    finally:
        batches.close()
    ids, offsets = [], []
    for name in schema.feature_names:
        feature = batch.sparse[name]
        ids.append(feature.values().numpy())
        offsets.append(feature.offsets().numpy())
    return Rows(ids, offsets, batch.labels.numpy())


def requests_of(rows: Rows, batch: int, seed: int, most: int = 256) -> list[tuple[Tensor, Tensor]]:
    """Requests of ``batch`` neighbouring rows from random places, as many as the rows fill, at least 8.

    Raises:
        ValueError: fewer rows than a request has.
    """
    if len(rows) < batch:
        raise UserError(f"--batch {batch}: there are {len(rows)} rows to draw requests from")
    count = min(most, max(8, len(rows) // batch))
    starts = np.random.default_rng([seed, batch]).integers(0, len(rows) - batch + 1, count)
    return [rows.request(int(start), int(start) + batch) for start in starts]


def kjt_scorer(names: Sequence[str], forward: Callable[[KeyedJaggedTensor], Tensor]) -> Score:
    keys = list(names)

    def score(values: Tensor, lengths: Tensor) -> Tensor:
        # Inference mode belongs to the thread, and clients are threads.
        with torch.inference_mode():
            return forward(KeyedJaggedTensor(keys, values, lengths=lengths, stride=len(lengths) // len(keys)))

    return score


def untrained(config: RunConfig, schema: Schema) -> CTRModel:
    """Return the model a run of this config begins with."""
    model = build_plain_model(config, schema)
    initialise_tables(model, config.seed, config.embeddings.init_scale)
    return model


def load_case(case: Case) -> Score:
    """Return what answers requests to the case.

    Raises:
        ValueError: no good run or artifact there.
    """
    if case.mode == "aot":
        assert case.source is not None
        return load(case.source).score
    if case.source is not None:
        model = restore_model(case.source, case.data).model
    else:
        assert case.config is not None
        model = untrained(case.config, case.schema)
    if case.mode == "compiled":
        model.dense = torch.compile(model.dense, dynamic=True)  # type: ignore[assignment]
    return kjt_scorer(case.schema.feature_names, model)


def timed_load(case: Case, first: tuple[Tensor, Tensor]) -> tuple[Score, float]:
    """Return the scorer, and the seconds from nothing loaded, but with all imports done, to its first answer."""
    begin = time.perf_counter()
    score = load_case(case)
    score(*first)
    return score, time.perf_counter() - begin
