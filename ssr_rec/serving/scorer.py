"""Score with an artifact: ``load(folder).predict(rows)``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.data.batch import Batch
from ssr_rec.data.item_weights import pooling_weights
from ssr_rec.kernels import extension
from ssr_rec.metrics.links import Links
from ssr_rec.serving.artifact import MODEL_FILE, Manifest, read_manifest
from ssr_rec.serving.graph import pooled_with_weights
from ssr_rec.serving.program import load_program
from ssr_rec.serving.raw_columns import Rows
from ssr_rec.serving.raw_rows import Encoded, Encoder
from ssr_rec.serving.shared_lists import events_of_rows, flat
from ssr_rec.serving.value_shares import ValueShares

logger = logging.getLogger(__name__)
_used_in: int | None = None
"""The process that has scored."""
MAX_ROWS = 2**16
"""Of one call of the compiled program; larger batches go through it piece by piece."""


def load(artifact: str | Path, runners: int = 1, check_files: bool = True) -> Scorer:
    """Open an artifact made by ``ssr_rec.serving.export``.

    Args:
        runners: threads that may be in the program at the same time; others wait.
        check_files: compare every file with its checksum first.

    Raises:
        UserError: not an artifact, a damaged one, or one that cannot run here; the message says why.
    """
    folder = Path(artifact)
    manifest = read_manifest(folder, check_files)
    if not extension.load():
        raise UserError(f"{folder}: needs ssr_rec's C++ operators, which could not be built here; see the warning")
    return Scorer(folder, manifest, runners)


class Scorer:
    """Scores with an artifact in memory; any number of threads may use it.

    Attributes:
        schema: the features and labels, in order.
        labels: the tasks, in the order of the logits' columns.
        tables, dense: the precisions.
        encoder: raw rows to ids.
        values: how many values given to ``predict`` were missing or unknown; a feature far from training is warned
            of once, by the logger of this module.
        manifest: everything else that is known of it.
    """

    def __init__(self, folder: Path, manifest: Manifest, runners: int = 1) -> None:
        self.manifest = manifest
        self.schema, self.labels = manifest.dataset, manifest.dataset.labels
        self.tables, self.dense = manifest.tables, manifest.dense
        self.encoder = Encoder(manifest.dataset, folder, manifest.files)
        self.values = ValueShares(manifest.dataset.features, manifest.trained_values)
        self._warned_of: set[str] = set()
        self._tables = [_mapped(folder / name) for name in manifest.stacks.values()]
        features = self.schema.features
        self._is_list = [feature.kind == "list" for feature in features]
        self._sizes = np.array([f.num_embeddings for f in features if f.kind != "list"], dtype=np.uint64)[:, None]
        self._list_sizes = [f.num_embeddings for f in features if f.kind == "list"]
        lists = [feature.name for feature in features if feature.kind == "list"]
        self._list_names = lists
        self._weighted = [lists.index(feature.name) for feature in pooled_with_weights(self.schema)]
        self._must_have_weights = {lists.index(feature.name) for feature in self.schema.weighted_lists}
        self._shares_lists = manifest.histories is not None
        self._histories = [lists.index(columns[0]) for columns in manifest.histories or ()]
        self._each_row = np.arange(MAX_ROWS)
        self._run = load_program(folder / MODEL_FILE, runners)

    def predict(self, rows: Rows, first_row: int = 0) -> dict[str, np.ndarray]:
        """Return label -> probabilities, or predictions of a label that is a number, (B,) float32 of raw rows.

        Args:
            rows: mappings, in which a key that is not there is missing; or a pandas DataFrame, an Arrow table, or the
                path of a parquet file, which must have a column for every feature. docs/inference.md says what becomes
                of odd values.
            first_row: what messages call the first row.

        Raises:
            UserError: rows that cannot be read; the message names row, feature and value.
        """
        return self.predict_encoded(self.encoder.encode(rows, first_row))

    def predict_encoded(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Return label -> probabilities or predictions (B,) float32 of rows that ``encoder`` has encoded."""
        found = predicted(self.score_arrays(*encoded), self.labels, self.manifest.links)
        if self.values.add(*encoded[:3]):
            self._warn_of_values()
        return found

    def _warn_of_values(self) -> None:
        for name, sentence in self.values.far_from_training().items():
            if name not in self._warned_of:
                self._warned_of.add(name)
                logger.warning("%s; are these the columns that the model was trained on?", sentence)

    def score(
        self,
        sparse: Tensor | KeyedJaggedTensor | Batch,
        lengths: Tensor | None = None,
        dense: Tensor | None = None,
        item_weights: KeyedJaggedTensor | None = None,
    ) -> Tensor:
        """Return logits (B, T) of prepared ids.

        Args:
            sparse: a batch, or the ids of every feature one after another in schema order.
            lengths: (F * B,) with ids: how many each feature has in each row, again feature by feature.
            dense: (B, C) float32 with ids: the scaled numbers of dense columns, NaN where missing.
            item_weights: with ids, as ``Batch`` has them.

        Raises:
            UserError: lengths that do not fit, or an id that the feature does not have.
        """
        return self.score_arrays(*self.encoded(sparse, lengths, dense, item_weights))

    def encoded(
        self,
        sparse: Tensor | KeyedJaggedTensor | Batch,
        lengths: Tensor | None = None,
        dense: Tensor | None = None,
        item_weights: KeyedJaggedTensor | None = None,
    ) -> Encoded:
        """Return prepared ids as ``encoder`` gives those of raw rows; arguments and errors are those of ``score``."""
        if isinstance(sparse, Batch):
            sparse, dense, item_weights = sparse.inputs
        if isinstance(sparse, KeyedJaggedTensor):
            if sparse.keys() != self.schema.feature_names:
                raise UserError(f"the batch has features {sparse.keys()}, the artifact {self.schema.feature_names}")
            sparse, lengths = sparse.values(), sparse.lengths()
        if lengths is None:
            raise UserError("score takes a batch, or values and lengths")
        numbers = dense.numpy() if dense is not None else None
        weights = None
        if item_weights is not None:
            of_lists = zip(item_weights.keys(), item_weights.values().split(item_weights.length_per_key()), strict=True)
            given = {name: own.numpy() for name, own in of_lists}
            weights = [given.get(feature.name) for feature in self.schema.features if feature.kind == "list"]
        ids, lists = self._split(sparse.numpy(), lengths.numpy())
        return Encoded(ids, lists, [None] * len(lists), numbers, weights)

    def _split(self, values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Return the single-valued ids (S, B), and ids (n,) and offsets (B + 1,) of each list."""
        fields = len(self._is_list)
        if lengths.size % fields:
            raise UserError(f"{lengths.size} lengths for {fields} features: give one per feature and row")
        lengths = lengths.reshape(fields, -1)
        rows = lengths.shape[1]
        singles, lists, at, first = [], [], 0, 0
        for feature, is_list in enumerate([*self._is_list, True]):
            if not is_list:
                continue
            if feature > first:
                if (lengths[first:feature] != 1).any():
                    raise UserError("a single-valued feature must have one id per row")
                stop = at + (feature - first) * rows
                singles.append(values[at:stop])
                at = stop
            if feature < fields:
                offsets = np.zeros(rows + 1, dtype=np.int64)
                np.cumsum(lengths[feature], out=offsets[1:])
                if rows and lengths[feature].min() < 0:
                    raise UserError("a list cannot have a negative length")
                lists.append((values[at : at + offsets[-1]], offsets))
                at += int(offsets[-1])
            first = feature + 1
        if at != values.size:
            raise UserError(f"{values.size} ids, but the lengths add up to {at}")
        joined = singles[0] if len(singles) == 1 else np.concatenate([*singles, values[:0]])
        return joined.reshape(fields - len(lists), rows), lists

    def score_arrays(
        self,
        ids: np.ndarray,
        lists: list[tuple[np.ndarray, np.ndarray]],
        of_rows: Sequence[np.ndarray | None] | None = None,
        dense: np.ndarray | None = None,
        weights: list[np.ndarray | None] | None = None,
    ) -> Tensor:
        """Return logits (B, T).

        Args:
            ids: (S, B) int64, of the single-valued features.
            lists: ids (n,) int64 and offsets (G + 1,) int64 of each list feature.
            of_rows: which of the G lists each row has, (B,) int64, or None for the k-th of B; by default all None.
            dense: (B, C) float32, the scaled numbers of dense columns, NaN where missing; None: the model has none.
            weights: of each list feature those of its ids, (n,) float32, None where items have none; None: no feature
                has any.

        Raises:
            UserError: an id that the feature does not have, numbers of another shape, or a process forked from one
                that has scored.
        """
        check_not_forked()
        self._check_ids(ids, lists)
        encoded = Encoded(ids, lists, list(of_rows or [None] * len(lists)), dense, weights)
        self._check_dense(dense, encoded.rows)
        if encoded.rows > MAX_ROWS:
            return torch.cat([self.score_arrays(*_cut(encoded, at)) for at in range(0, encoded.rows, MAX_ROWS)])
        if not encoded.rows:
            return torch.empty(0, len(self.labels))
        if not self._shares_lists:
            encoded = flat(encoded)
        inputs = [ids]
        for one in encoded.lists:
            inputs += one
        inputs += self._pooling_weights(encoded)
        if self._shares_lists:
            inputs += [self._each_row[: encoded.rows] if rows is None else rows for rows in encoded.of_rows]
            inputs += [events_of_rows(encoded.lists[at][1], encoded.of_rows[at]) for at in self._histories]
        # The program has no graph for no ids or events at all; one that no row points to changes nothing.
        filled = [torch.from_numpy(array if array.size else np.zeros(1, array.dtype)) for array in inputs[1:]]
        numbers = [torch.from_numpy(dense)] if dense is not None else []
        return self._run([torch.from_numpy(ids), *filled, *self._tables, *numbers])[0]

    def _pooling_weights(self, encoded: Encoded) -> list[np.ndarray]:
        """Return what the program takes as weights of the lists that are pooled with some."""
        found = []
        for place in self._weighted:
            (ids, offsets), own = encoded.lists[place], None if encoded.weights is None else encoded.weights[place]
            if (own is None or own.shape != ids.shape) and place in self._must_have_weights:
                raise UserError(f"list feature {self._list_names[place]!r}: give a weight for each of its ids")
            raw = torch.from_numpy(np.ones(ids.shape, np.float32) if own is None else own)
            lengths = torch.from_numpy(np.diff(offsets))
            found.append(pooling_weights(raw, lengths, self.manifest.pooling == "mean").numpy())
        return found

    def _check_dense(self, dense: np.ndarray | None, rows: int) -> None:
        columns = sum(self.schema.dense_widths)
        given = None if dense is None else dense.shape
        if given != ((rows, columns) if columns else None):
            raise UserError(f"numbers of shape {given} for {rows} rows and {columns} of dense columns and vectors")

    def _check_ids(self, ids: np.ndarray, lists: list[tuple[np.ndarray, np.ndarray]]) -> None:
        # As unsigned numbers negative ids are too large as well.
        wrong = ids.view(np.uint64) >= self._sizes
        if wrong.any():
            feature, row = np.argwhere(wrong)[0]
            name = [f.name for f in self.schema.features if f.kind != "list"][feature]
            raise UserError(f"row {row}: feature {name!r} has no id {ids[feature, row]}{_why(ids[feature, row])}")
        for place, ((values, _), size) in enumerate(zip(lists, self._list_sizes, strict=True)):
            wrong = values.view(np.uint64) >= np.uint64(size)
            if wrong.any():
                name = [f.name for f in self.schema.features if f.kind == "list"][place]
                raise UserError(f"feature {name!r} has no id {values[wrong][0]}{_why(values[wrong][0])}")


def _why(identity: int) -> str:
    # As ``kernels/cpu/value_ids.h`` says it.
    return " (of raw rows: the index of its vocabulary is damaged, export the run again)" if identity == -1 else ""


def predicted(logits: Tensor, labels: Sequence[str], links: Links) -> dict[str, np.ndarray]:
    """Return label -> probabilities, or predictions of a label that is a number, (B,) float32 of logits (B, T)."""
    probabilities = logits.sigmoid().numpy()
    found = {label: probabilities[:, task] for task, label in enumerate(labels)}
    for task, label in enumerate(labels):
        if label in links:
            found[label] = links[label].predict(logits[:, task].numpy()).astype(np.float32)
    return found


def check_not_forked() -> None:
    """Refuse to score in a process forked from one that has scored: its threads are not there, and OpenMP would wait.

    Raises:
        UserError: says how to start such a process.
    """
    global _used_in
    if _used_in not in (None, os.getpid()):
        raise UserError(
            f"process {os.getpid()} was forked from {_used_in}, which has scored before, so that OpenMP would wait for "
            "threads that only the parent has: score first in the children (gunicorn --preload may load, not score), "
            "or start them by multiprocessing.get_context('spawn')"
        )
    _used_in = os.getpid()


def _cut(encoded: Encoded, start: int) -> Encoded:
    """Return ``MAX_ROWS`` rows from ``start`` on."""
    part, lists = slice(start, start + MAX_ROWS), []
    weights = list(encoded.weights or [None] * len(encoded.lists))
    for place, ((values, offsets), rows) in enumerate(zip(encoded.lists, encoded.of_rows, strict=True)):
        inner = offsets[start : start + MAX_ROWS + 1]
        lists.append((values[inner[0] : inner[-1]], inner - inner[0]) if rows is None else (values, offsets))
        own = weights[place]
        if rows is None and own is not None:
            weights[place] = own[inner[0] : inner[-1]]
    of_rows = [None if rows is None else rows[part] for rows in encoded.of_rows]
    dense = None if encoded.dense is None else encoded.dense[part]
    ids = np.ascontiguousarray(encoded.ids[:, part])
    return Encoded(ids, lists, of_rows, dense, weights if encoded.weights else None)


def _mapped(path: Path) -> Tensor:
    """Return an array on disk, of which only the pages in use take memory."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a table: {error}; export the run again") from None
    return torch.from_numpy(array)
