"""Turns given vectors into fields: looks up the one of a row's value, and maps it linearly to D dims."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import Feature
from ssr_rec.data.schema import Schema
from ssr_rec.data.value_columns import ids_of
from ssr_rec.over_archs.base import dense_flops
from ssr_rec.over_archs.layers import init_dense_


class VectorFields(nn.Module):
    """Makes the fields of features that have given vectors: ``forward(ids of each feature (B,)) -> (B, sum of D)``.

    Args:
        features: those with vectors.
        field_dim: D of each field.
    """

    def __init__(self, features: Sequence[Feature], field_dim: int) -> None:
        super().__init__()
        self.names = [feature.name for feature in features]
        self.dims = [field_dim] * len(self.names)
        self.linears = nn.ModuleList()
        for place, feature in enumerate(features):
            assert feature.vectors is not None
            # The dataset has them; a checkpoint holds what was learned.
            table = torch.zeros(feature.num_embeddings, feature.vectors.dim)
            self.register_buffer(f"table{place}", table, persistent=False)
            linear = nn.Linear(feature.vectors.dim, field_dim)
            init_dense_(linear.weight, linear.bias, feature.vectors.dim, field_dim, "glorot")
            self.linears.append(linear)

    @property
    def tables(self) -> list[Tensor]:
        """Return the vectors (num_embeddings, E) of each feature."""
        return [getattr(self, f"table{place}") for place in range(len(self.names))]

    def without_tables(self) -> VectorFields:
        """Return the same fields, whose ``forward`` must be given the vectors."""
        found = copy.copy(self)
        found._buffers = {name: table.new_empty(0, table.shape[1]) for name, table in self.named_buffers()}
        return found

    def of_batch(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the fields (B, sum of D) of a batch."""
        return self([ids_of(sparse, name) for name in self.names])

    def forward(self, ids: Sequence[Tensor], tables: Sequence[Tensor] | None = None) -> Tensor:
        """Return the fields of ids, (B,) of each feature; ``tables``: other vectors than its own."""
        found = zip(self.linears, self.tables if tables is None else tables, ids, strict=True)
        return torch.cat([linear(nn.functional.embedding(one, table)) for linear, table, one in found], dim=1)

    def matmul_flops(self) -> int:
        """Return the operations of its matrix products in one forward pass of one row."""
        linears = (cast(nn.Linear, linear) for linear in self.linears)
        return sum(dense_flops(linear.in_features, linear.out_features).matmul for linear in linears)


def fill_vectors(fields: VectorFields | None, schema: Schema, folder: Path | None) -> None:
    """Copy the dataset's vectors into the model, in place.

    Raises:
        UserError: a file that is not there or not of its shape.
    """
    if fields is None:
        return
    assert folder is not None, "a model of given vectors needs the dataset that has them"
    features = {feature.name: feature for feature in schema.features}
    for name, table in zip(fields.names, fields.tables, strict=True):
        given = features[name].vectors
        assert given is not None
        path = folder / given.file
        try:
            with path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not the vectors of {name!r}: {error}; prepare the log again") from None
        if found.shape != tuple(table.shape):
            raise UserError(f"{path}: shape {found.shape}, the schema says {tuple(table.shape)}; prepare the log again")
        with torch.no_grad():
            table.copy_(torch.from_numpy(found))
