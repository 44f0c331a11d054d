"""Turns given vectors into fields: looks up the one of a row's value, and maps it linearly to D dims."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ssr_rec.data.features import Feature
from ssr_rec.data.given_vectors import stored_vectors
from ssr_rec.data.schema import Schema
from ssr_rec.data.value_columns import ids_of
from ssr_rec.embeddings.tables import by_key
from ssr_rec.over_archs.base import dense_flops
from ssr_rec.over_archs.layers import init_dense_


class VectorFields(nn.Module):
    """Makes the fields (B, sum of D) of features that have given vectors: ``of_batch(embeddings, sparse of B rows)``.

    Args:
        features: those with vectors.
        field_dim: D of each field.
        trained: those of them whose vectors are in the model's tables; it holds the others' itself.
    """

    def __init__(self, features: Sequence[Feature], field_dim: int, trained: Collection[str] = ()) -> None:
        super().__init__()
        self.names = [feature.name for feature in features]
        self.dims = [field_dim] * len(self.names)
        self.sizes: list[int] = []
        self.trained = frozenset(trained)
        self.linears = nn.ModuleList()
        for place, feature in enumerate(features):
            assert feature.vectors is not None
            self.sizes.append(feature.vectors.dim)
            if feature.name not in self.trained:
                # The dataset has them; a checkpoint holds what was learned.
                table = torch.zeros(feature.num_embeddings, feature.vectors.dim)
                self.register_buffer(f"table{place}", table, persistent=False)
            linear = nn.Linear(feature.vectors.dim, field_dim)
            init_dense_(linear.weight, linear.bias, feature.vectors.dim, field_dim, "glorot")
            self.linears.append(linear)

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Return feature -> its vectors (num_embeddings, E), of those that stay as given."""
        places = {name: place for place, name in enumerate(self.names) if name not in self.trained}
        return {name: getattr(self, f"table{place}") for name, place in places.items()}

    def without_tables(self) -> VectorFields:
        """Return the same fields, whose ``forward`` must be given the vectors."""
        found = copy.copy(self)
        found._buffers = {name: table.new_empty(0, table.shape[1]) for name, table in self.named_buffers()}
        return found

    def of_batch(self, embeddings: KeyedTensor, sparse: KeyedJaggedTensor | None) -> Tensor:
        """Return the fields (B, sum of D) of a batch.

        Args:
            embeddings: pooled; they have the vectors that are trained.
            sparse: the ids of the others.
        """
        pooled, frozen, vectors = by_key(embeddings) if self.trained else {}, self.frozen, []
        for name, size in zip(self.names, self.sizes, strict=True):
            if name in self.trained:
                # Apart from its neighbours, so that it is multiplied to the bit as a frozen one is.
                vectors.append(pooled[name][:, :size].contiguous())
            else:
                assert sparse is not None, "vectors that stay as given are looked up by id"
                vectors.append(nn.functional.embedding(ids_of(sparse, name), frozen[name]))
        return self._mapped(vectors)

    def forward(self, ids: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
        """Return the fields (B, sum of D) of ids, (B,) of each feature, by ``tables`` of their vectors."""
        return self._mapped([nn.functional.embedding(one, table) for one, table in zip(ids, tables, strict=True)])

    def _mapped(self, vectors: Sequence[Tensor]) -> Tensor:
        return torch.cat([linear(one) for linear, one in zip(self.linears, vectors, strict=True)], dim=1)

    def matmul_flops(self) -> int:
        """Return the operations of its matrix products in one forward pass of one row."""
        linears = (cast(nn.Linear, linear) for linear in self.linears)
        return sum(dense_flops(linear.in_features, linear.out_features).matmul for linear in linears)


def fill_vectors(fields: VectorFields | None, schema: Schema, folder: Path | None) -> None:
    """Copy the dataset's vectors into the model, in place, but for those that are trained.

    Raises:
        UserError: a file that is not there or not of its shape.
    """
    if fields is None or not fields.frozen:
        return
    assert folder is not None, "a model of given vectors needs the dataset that has them"
    features = {feature.name: feature for feature in schema.features}
    for name, table in fields.frozen.items():
        with torch.no_grad():
            table.copy_(torch.from_numpy(np.array(stored_vectors(features[name], folder))))
