"""Chooses the ids of the tables that weighted lists read, and gives each its weight in the pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.data.item_weights import pooling_weights
from ssr_rec.data.schema import Schema


class WeightedIds(nn.Module):
    """Makes what the weighted tables look up: ``forward(sparse, item_weights) -> KeyedJaggedTensor`` with weights.

    A feature that has none and shares a table with a weighted list has weights of 1. For a mean, the weights of a list
    are divided by their sum (``pooling_weights``).
    """

    def __init__(self, schema: Schema, pooling: str) -> None:
        super().__init__()
        read = [feature for feature in schema.embedded if feature.table in schema.weighted_tables]
        self.names = [feature.name for feature in read]
        self.lists = {feature.name for feature in read if feature.kind == "list"}
        self.is_mean = pooling == "mean"

    @classmethod
    def of(cls, schema: Schema, pooling: str) -> WeightedIds | None:
        """Return None where no list has weights."""
        return cls(schema, pooling) if schema.weighted_lists else None

    def forward(self, sparse: KeyedJaggedTensor, item_weights: KeyedJaggedTensor | None) -> KeyedJaggedTensor:
        assert item_weights is not None, "a model of weighted lists needs their weights"
        keys = sparse.keys()
        all_ids = sparse.values().split(sparse.length_per_key())
        all_lengths = sparse.lengths().view(len(keys), -1)
        given = dict(zip(item_weights.keys(), item_weights.values().split(item_weights.length_per_key()), strict=True))
        places = [keys.index(name) for name in self.names]
        weights: list[Tensor] = []
        for name, place in zip(self.names, places, strict=True):
            own = given.get(name)
            if own is None:
                own = torch.ones_like(all_ids[place], dtype=torch.float32)
            weights.append(pooling_weights(own, all_lengths[place], self.is_mean and name in self.lists))
        return KeyedJaggedTensor(
            keys=self.names,
            values=torch.cat([all_ids[place] for place in places]),
            weights=torch.cat(weights),
            lengths=all_lengths[places].flatten(),
            stride=sparse.stride(),
        )
