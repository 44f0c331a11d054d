"""Turns histories into fields: feeds each sequence's encoder with the un-pooled vectors of its events and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.data.features import Feature, LogBuckets
from ssr_rec.embeddings.histories import History, Reading, event_vectors
from ssr_rec.sequences.base import SequenceEncoder
from ssr_rec.sequences.jagged import Jagged, Shared
from ssr_rec.sequences.registry import ENCODERS, build_encoder


class HistoryFields(nn.Module):
    """Makes the fields that are read un-pooled: of sequences, and of single features that share their tables.

    Args:
        reading: how each feature is read.
        embeddings: dims of the tables.

    Raises:
        UserError: an encoder's sizes do not fit; or it needs a target or ages that the sequence does not have.
    """

    def __init__(self, reading: Reading, embeddings: EmbeddingsConfig) -> None:
        super().__init__()
        self.events = {table: [f.name for f in features] for table, features in reading.events.items()}
        self.histories = reading.histories
        own_fields = {feature.name for feature in reading.fields}
        self.own = {f.name: f for features in reading.events.values() for f in features if f.name in own_fields}
        self.mean = embeddings.pooling == "mean"
        self.field_dim = embeddings.dim
        columns = [column for history in reading.histories for column in history.columns]
        self.column_dims = {column.name: embeddings.dim_of(column.table) for column in columns}
        encoders = {}
        for history in reading.histories:
            event, target = (sum(embeddings.dim_of(f.table) for f in fs) for fs in (history.columns, history.targets))
            encoders[history.name] = _encoder(history, event, target, self.field_dim)
            if history.age is not None:
                self.register_buffer(f"ages_{history.name}", bucket_ages(history.age), persistent=False)
        self.encoders = nn.ModuleDict(encoders)

    @property
    def names(self) -> list[str]:
        """Return the name of each field that an encoder adds: ``sequence.encoder``, numbered if there are several."""
        names = []
        for history, encoder in self.pairs():
            name = f"{history.name}.{history.config.encoder.name}"
            names += [name] if encoder.out_fields == 1 else [f"{name}{i}" for i in range(encoder.out_fields)]
        return names

    @property
    def dims(self) -> list[int]:
        """Return the dim of each field that an encoder adds."""
        return [self.field_dim] * len(self.names)

    def pairs(self) -> list[tuple[History, SequenceEncoder]]:
        """Return each sequence with its encoder."""
        encoders = (cast(SequenceEncoder, encoder) for encoder in self.encoders.values())
        return list(zip(self.histories, encoders, strict=True))

    def forward(self, looked_up: KeyedTensor, sparse: KeyedJaggedTensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the fields of features of their own, (B, D) each by name, and those of all encoders, (B, sum of D)."""
        vectors = event_vectors(self.events, looked_up, sparse)
        ids = dict(zip(sparse.keys(), sparse.values().split(sparse.length_per_key()), strict=True))
        lengths = dict(zip(sparse.keys(), sparse.lengths().view(len(sparse.keys()), -1), strict=True))
        fields = {name: self._own(feature, vectors[name], lengths[name]) for name, feature in self.own.items()}
        return fields, self.encode(vectors, ids, lengths)

    def encode(
        self,
        vectors: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        shared: Sequence[Shared] | None = None,
    ) -> Tensor:
        """Return the encoders' fields (B, sum of D).

        Args:
            vectors: feature -> (n, D) of its ids; of the columns of sequences and of their targets.
            ids: feature -> (n,), of ages.
            lengths: feature -> (B,), of the columns of sequences.
            shared: of each sequence, which history each row has; None: row k has the k-th.
        """
        encoded = []
        for at, (history, encoder) in enumerate(self.pairs()):
            events = torch.cat([vectors[column.name] for column in history.columns], dim=1)
            target = torch.cat([vectors[f.name] for f in history.targets], dim=1) if history.targets else None
            ages = None if history.age is None else getattr(self, f"ages_{history.name}")[ids[history.age.name]]
            of_events = lengths[history.columns[0].name]
            if shared is None:
                encoded.append(encoder(events, of_events, target, ages))
            else:
                encoded.append(encoder.forward_shared(events, of_events, shared[at], target, ages))
        return torch.cat(encoded, dim=1)

    def _own(self, feature: Feature, vectors: Tensor, lengths: Tensor) -> Tensor:
        if feature.kind != "list":
            return vectors
        total = Jagged.of(lengths, vectors.shape[0]).sum(vectors)
        return total / lengths.clamp_min(1).unsqueeze(1) if self.mean else total


def _encoder(history: History, event_dim: int, target_dim: int, field_dim: int) -> SequenceEncoder:
    where = f"sequences.{history.name}"
    kind = ENCODERS.get(history.config.encoder.name)
    if kind is not None and kind.needs_target and not history.targets:
        raise UserError(
            f"{where}.encoder: {history.config.encoder.name} needs a target, and no single-valued feature is of a "
            f"vocabulary of {history.name!r}: name both under vocabularies in the spec and prepare the log again, or "
            "use pool"
        )
    try:
        encoder = build_encoder(event_dim, target_dim, field_dim, history.max_length, history.config.encoder)
    except UserError as error:
        raise UserError(f"{where}.encoder: {error}") from None
    if encoder.needs_ages and history.age is None:
        raise UserError(
            f"{where}.encoder: {history.config.encoder.name} needs the ages of the events, which the sequence does not "
            "have: give age in the spec and prepare the log again, or choose settings without age"
        )
    return encoder


def bucket_ages(feature: Feature) -> Tensor:
    """Return the age that each id of a log-bucketed feature stands for, the middle of its bucket: (num_embeddings,)."""
    encoding = feature.encoding
    assert isinstance(encoding, LogBuckets)
    ages = torch.zeros(feature.num_embeddings)
    for identity in range(encoding.first_id, encoding.first_id + encoding.num_buckets):
        ages[identity] = max(0.0, encoding.middle(identity))
    return ages
