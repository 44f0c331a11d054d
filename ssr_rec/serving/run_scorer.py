"""Scores raw rows with a run itself, nothing exported: for a notebook, where compiling would take longer than scoring.

``RunScorer(run).predict(rows)`` reads rows as the artifact's ``Scorer`` does, and computes with the trainer's model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.data.schema import Schema
from ssr_rec.serving.raw_columns import Rows
from ssr_rec.serving.raw_rows import Encoded, Encoder
from ssr_rec.serving.scorer import predicted
from ssr_rec.serving.trained_model import restore_model

ROWS_AT_ONCE = 2**13


class RunScorer:
    """Scores with the best weights of a run on the CPU.

    Args:
        run: the run folder.
        data: where the run's prepared dataset, or its schema and vocabularies alone, are now; None: where the config
            says.

    Attributes:
        labels: the tasks.

    Raises:
        UserError: see ``restore_model``.
    """

    def __init__(self, run: str | Path, data: str | Path | None = None) -> None:
        self.restored = restore_model(run, data)
        self.labels = self.restored.schema.labels
        self.encoder = Encoder(self.restored.schema, self.restored.data)

    def predict(self, rows: Rows, first_row: int = 0) -> dict[str, np.ndarray]:
        """Return label -> probabilities or predictions (B,) float32 of raw rows; see ``Scorer.predict``."""
        encoded = self.encoder.encode(rows, first_row)
        logits = [torch.empty(0, len(self.labels))]
        with torch.no_grad():
            for start in range(0, encoded.rows, ROWS_AT_ONCE):
                part = slice(start, min(start + ROWS_AT_ONCE, encoded.rows))
                numbers = torch.from_numpy(encoded.dense[part]) if encoded.dense is not None else None
                sparse = sparse_of(self.restored.schema, encoded, part)
                weights = weights_of(self.restored.schema, encoded, part)
                logits.append(self.restored.model(sparse, numbers, weights))
        return predicted(torch.cat(logits), self.labels, self.restored.links)


def sparse_of(schema: Schema, encoded: Encoded, rows: slice) -> KeyedJaggedTensor:
    """Return the ids of rows ``start`` to ``stop`` of ``encoded`` as a model takes them, keys in schema order."""
    singles, lists = iter(encoded.ids), iter(encoded.lists)
    values, lengths = [], []
    for feature in schema.features:
        if feature.kind == "list":
            ids, offsets = next(lists)
            offsets = offsets[rows.start : rows.stop + 1]
            values.append(ids[offsets[0] : offsets[-1]])
            lengths.append(np.diff(offsets))
        else:
            values.append(next(singles)[rows])
            lengths.append(np.ones(rows.stop - rows.start, dtype=np.int64))
    return KeyedJaggedTensor(
        keys=schema.feature_names,
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )


def weights_of(schema: Schema, encoded: Encoded, rows: slice) -> KeyedJaggedTensor | None:
    """Return the weights of lists' items of rows ``start`` to ``stop`` of ``encoded``, as ``Batch`` has them."""
    if encoded.weights is None:
        return None
    values, lengths = [], []
    for (_, offsets), weights in zip(encoded.lists, encoded.weights, strict=True):
        if weights is not None:
            offsets = offsets[rows.start : rows.stop + 1]
            values.append(weights[offsets[0] : offsets[-1]])
            lengths.append(np.diff(offsets))
    return KeyedJaggedTensor(
        keys=[feature.name for feature in schema.weighted_lists],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )
