"""Resolves a config's sequences against a schema: what an event is made of, and which tables are read un-pooled.

A table that a sequence reads is read un-pooled for every feature of it, since no table can be in two collections
(pytorch/torchrec#2268). FBGEMM reads un-pooled rows on the CPU many times slower than bags of one id each
(tools/bench_sequences.py), so ``EventIds`` makes such bags: one key a table, one bag an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.sequences import SequenceConfig
from ssr_rec.data.event_sequences import EventSequence
from ssr_rec.data.features import Feature
from ssr_rec.data.schema import Schema


@dataclass(frozen=True)
class History:
    """Describes a sequence that an encoder reads.

    Attributes:
        columns: the features of an event, those with a target first, in the order of ``targets``.
        targets: what the events are seen from.
        age: which of the columns holds the ages of the events.
        max_length: most events of a row.
    """

    name: str
    columns: tuple[Feature, ...]
    targets: tuple[Feature, ...]
    age: Feature | None
    max_length: int
    config: SequenceConfig


def resolve_histories(sequences: Mapping[str, SequenceConfig], schema: Schema) -> list[History]:
    """Find what the config names in the schema; a list feature is a sequence of one column, under its own name.

    Raises:
        UserError: no such sequence, an event in two of them, or a target that is no single-valued feature of a table
            that the sequence reads.
    """
    known = {sequence.name: sequence for sequence in schema.sequences}
    in_one = {name for sequence in schema.sequences for name in sequence.features}
    for feature in schema.features:
        if feature.kind == "list" and feature.name not in in_one:
            known.setdefault(feature.name, EventSequence(name=feature.name, features=[feature.name]))
    histories = []
    for name, config in sequences.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise UserError(f"sequences.{name}: dataset {schema.name!r} has no such sequence; it has {names}")
        histories.append(_history(known[name], config, schema))
    return histories


def _history(sequence: EventSequence, config: SequenceConfig, schema: Schema) -> History:
    by_name = {feature.name: feature for feature in schema.features}
    columns = [by_name[name] for name in sequence.features]
    tables = [feature.table for feature in columns]
    fitting = [f for f in schema.features if f.kind != "list" and f.table in tables]
    for name in config.target or ():
        if name not in [feature.name for feature in fitting]:
            why = "is no feature of the dataset"
            if name in by_name:
                why = f"is not of the vocabulary of any column of {sequence.name!r}"
            having = ", ".join(feature.name for feature in fitting) or "none"
            raise UserError(
                f"sequences.{sequence.name}.target: {name!r} {why}, so no event can be compared with it; those that "
                f"can: {having}. Name it and the column under vocabularies in the spec, and prepare the log again"
            )
    chosen = [by_name[name] for name in config.target] if config.target else fitting
    # One target a column: others of its table would be compared with nothing.
    targets: dict[str, Feature] = {}
    for feature in chosen:
        if feature.table in targets and config.target:
            raise UserError(
                f"sequences.{sequence.name}.target: {targets[feature.table].name!r} and {feature.name!r} are of one "
                "vocabulary; name one of them"
            )
        targets.setdefault(feature.table, feature)
    first = [column for column in _one_a_table(columns) if column.table in targets]
    return History(
        name=sequence.name,
        columns=(*first, *(column for column in columns if column not in first)),
        targets=tuple(targets[column.table] for column in first),
        age=by_name[sequence.age] if sequence.age else None,
        max_length=max(feature.max_length or 1 for feature in columns),
        config=config,
    )


def _one_a_table(columns: Sequence[Feature]) -> list[Feature]:
    found: dict[str, Feature] = {}
    for column in columns:
        found.setdefault(column.table, column)
    return list(found.values())


@dataclass(frozen=True)
class Reading:
    """Says which features are read how.

    Attributes:
        fields: features with a table and a field of their own in the input vector, in schema order: not the events'.
        events: table -> the features of it, for the tables that are read un-pooled.
        histories: those with an encoder.
    """

    fields: tuple[Feature, ...]
    events: dict[str, tuple[Feature, ...]]
    histories: tuple[History, ...]

    @property
    def pooled(self) -> list[Feature]:
        """Return the fields whose table is read pooled."""
        return [feature for feature in self.fields if feature.table not in self.events]


def reading_of(schema: Schema, sequences: Mapping[str, SequenceConfig]) -> Reading:
    """Decide for every feature of the schema how it is read.

    Raises:
        UserError: see ``resolve_histories``; or no feature is left to be pooled.
    """
    histories = resolve_histories(sequences, schema)
    in_events = {column.name for history in histories for column in history.columns}
    tables = [column.table for history in histories for column in history.columns]
    events = {
        table: tuple(feature for feature in schema.features if feature.table == table)
        for table in dict.fromkeys(tables)
    }
    for table in schema.weighted_tables:
        if table in events:
            raise UserError(
                f"sequences: table {table!r} is of a list with weights, too, which a sequence has no place for; give "
                "the list a vocabulary of its own, or no weights, and prepare the log again"
            )
    reading = Reading(tuple(f for f in schema.embedded if f.name not in in_events), events, tuple(histories))
    if all(feature.table in schema.weighted_tables for feature in reading.pooled):
        raise UserError(
            f"every feature of {schema.name!r} is of a table that a sequence or a list with weights reads; the model "
            "needs one that is not, such as the user's"
        )
    return reading


class EventIds(nn.Module):
    """Puts the ids of the un-pooled tables in bags of one: KeyedJaggedTensor of B rows to one of as many bags as ids.

    ``events`` names the features of each table, whose key holds their ids one after another. All keys have as many bags
    as the longest; those beyond a key's ids are empty.
    """

    def __init__(self, events: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.events = dict(events)

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys, ends, values = sparse.keys(), sparse.offset_per_key(), sparse.values()
        pieces, counts = [], []
        for features in self.events.values():
            places = [keys.index(name) for name in features]
            pieces += [values[ends[place] : ends[place + 1]] for place in places]
            counts.append(sum(ends[place + 1] - ends[place] for place in places))
        stride = max(counts)
        lengths = torch.zeros(len(counts), stride, dtype=torch.int32, device=values.device)
        for row, count in zip(lengths, counts, strict=True):
            row[:count] = 1
        return KeyedJaggedTensor(
            keys=list(self.events), values=torch.cat(pieces), lengths=lengths.flatten(), stride=stride
        )


def event_vectors(
    events: Mapping[str, Sequence[str]], looked_up: KeyedTensor, sparse: KeyedJaggedTensor
) -> dict[str, Tensor]:
    """Return feature -> the vectors (N, D) of its ids in the order of the batch, from what the tables gave.

    Args:
        events: of ``EventIds``.
        looked_up: the tables' rows, one a bag.
        sparse: the batch, for how many ids each feature has.
    """
    counts = dict(zip(sparse.keys(), sparse.length_per_key(), strict=True))
    tables = dict(zip(looked_up.keys(), looked_up.values().split(looked_up.length_per_key(), dim=1), strict=True))
    vectors: dict[str, Tensor] = {}
    for table, features in events.items():
        sizes = [counts[name] for name in features]
        pieces = tables[table].split([*sizes, tables[table].shape[0] - sum(sizes)])
        vectors.update(zip(features, pieces, strict=False))
    return vectors
