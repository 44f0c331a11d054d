"""Describes a prepared dataset: features, cardinalities, labels, group id, splits; read and written as schema.json.

A prepared dataset is a folder: ``schema.json``, parquet shards of each split, and the fitted vocabularies.
In a shard, a single-valued feature is an int64 column of ids, a list feature a ``list<int64>`` column,
a dense column a float64 one, a vector of a row a ``list<float64>``, a label an int8 column of 0 and 1, or a float32
one of numbers, and the evaluation group (GAUC) the int64 column ``GROUP_COLUMN``. A label that may be missing is -1, or
null of numbers, where it is not observed; weights of rows are the float column ``WEIGHT_COLUMN``. No other columns than
these labels and dense ones hold nulls: a missing value already has an id of its own, a missing list or vector is empty.

Damage shows: ``schema.json`` holds a checksum of its own content and one of each shard's footer, and the pages of a
shard hold theirs (``data/shards.py``). Datasets from before there were checksums are read without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local, place
from ssr_rec.common.plain_values import canonical_json, parse_json, read_text
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.data.dense import DenseColumn, RowVector
from ssr_rec.data.event_sequences import EventSequence, check_sequences, check_vocabularies
from ssr_rec.data.features import Column, Feature, Vocabulary
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.splits import Lookups, Split

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"
GROUP_COLUMN = "__group_id__"
TOGETHER_COLUMN = "__together__"
WEIGHT_COLUMN = "__weight__"
NOT_OBSERVED = -1
"""Of a binary label that may be missing."""
DATASET_ID_KEY = b"ssr_rec.dataset_id"
"""Key of the parquet file metadata that ties a shard to its schema."""
VALUES_KEY, VALUES = "values", 2
"""In ``Schema.preparation``: which form the text of values has. From 2 on it is one form, whatever the container."""
SHARD_KEY = b"ssr_rec.shard"
"""Key of the parquet file metadata that says which shard it is, so that no two footers are equal."""

CHECKSUM_KEY = "checksum"
"""Key of ``schema.json`` beside those of ``Schema``."""
MAX_SCHEMA_BYTES = 2**26
"""Some 200,000 shards, or 100,000 features."""

SPLITS = ("train", "validation", "test")


class Ceiling(Settings):
    """Says what the true probabilities of a synthetic log reach on a split: no model can do better but by luck."""

    auc: float
    logloss: float = Field(description="nats per row")


class Days(Settings):
    """The splits of a dataset are days."""

    names: list[str] = Field(min_length=2, description="the splits, in order of time")
    fitted: int = Field(ge=1, description="vocabularies and bucket ranges are those of so many first days")


class Addition(Settings):
    """Records days added to a dataset after it was made (``data/preparation/append_days.py``)."""

    before: str = Field(description="dataset_id until then")
    days: list[str] = Field(min_length=1, description="the added ones, in order of time")
    grown: dict[str, dict[str, Annotated[int, Field(ge=1)]]] = Field(
        default_factory=dict,
        description="day -> feature -> rows of its table before the new values of that day got ids; "
        "empty: no value got one",
    )


class Schema(Settings):
    format_version: Literal[1] = 1
    name: str
    dataset_id: str = Field(description="of what made the dataset and of its rows: other rows, another id")
    shard_ids: list[str] = Field(
        default_factory=list,
        description="in every shard's file metadata is one of them, or a dataset_id; else datasets are mixed",
    )
    features: list[Feature] = Field(min_length=1)
    sequences: list[EventSequence] = Field(default_factory=list)
    dense: list[DenseColumn] = Field(default_factory=list, description="raw numbers, null where missing")
    row_vectors: list[RowVector] = Field(default_factory=list, description="columns of vectors, empty where missing")
    labels: list[Column] = Field(min_length=1)
    group_id: str | None = Field(None, description="raw column behind GROUP_COLUMN, the users of GAUC")
    together: str | None = Field(None, description="raw column of the groups whose rows lie next to one another")
    weight: str | None = Field(None, description="raw column behind WEIGHT_COLUMN; None: all rows count the same")
    missing_labels: list[Column] = Field(
        default_factory=list, description="labels that are -1 where they are not observed or their task does not ask"
    )
    numbers: list[NumberLabel] = Field(default_factory=list, description="labels that are numbers; others are binary")
    negatives: float = Field(1.0, gt=0, le=1, description="share of the negative training rows that was kept")
    splits: dict[str, Split]
    days: Days | None = Field(None, description="None: the splits are train, validation and test")
    additions: list[Addition] = Field(default_factory=list, description="in the order they were made")
    ceiling: dict[str, dict[str, Ceiling]] = Field(default_factory=dict, description="split -> label, synthetic only")
    preparation: dict[str, Any] = Field(default_factory=dict, description="what made it: preset, seed, split rule")

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        if self.negatives < 1 and len(self.labels) > 1:
            raise UserError("negatives: below 1 there can be one label alone")
        stored = (GROUP_COLUMN, TOGETHER_COLUMN, WEIGHT_COLUMN)
        _refuse_repeated("names", [*self.feature_names, *self.dense_names, *self.labels, *stored])
        _refuse_repeated("missing_labels", self.missing_labels)
        if not set(self.missing_labels) <= set(self.labels):
            raise UserError("missing_labels names what is no label")
        _refuse_repeated("numbers", self.number_names)
        if not set(self.number_names) <= set(self.labels):
            raise UserError("numbers names what is no label")
        check_vocabularies(self.features)
        check_sequences(self.sequences, self.features)
        for split_name, split in self.splits.items():
            _refuse_repeated(f"split {split_name!r}: shards", [shard.path for shard in split.shards])
            if split.num_rows != sum(shard.num_rows for shard in split.shards):
                raise UserError(f"split {split_name!r}: num_rows is not the sum over its shards")
        if self.days is not None:
            _refuse_repeated("days", self.days.names)
            if set(self.days.names) != set(self.splits) or self.days.fitted >= len(self.days.names):
                raise UserError("days: its names must be the splits, and fitted fewer than there are")
        added = [day for addition in self.additions for day in addition.days]
        if added and (self.days is None or self.days.names[-len(added) :] != added):
            raise UserError("additions: their days must be the last of days.names")
        vocabularies = {feature.name for feature in self.features if isinstance(feature.encoding, Vocabulary)}
        for addition in self.additions:
            if not set(addition.grown) <= set(addition.days):
                raise UserError("additions: grown names a day that was not added")
            for sizes in addition.grown.values():
                if not set(sizes) <= vocabularies:
                    raise UserError("additions: grown names a feature without a vocabulary")
        return self

    @property
    def feature_names(self) -> list[str]:
        return [feature.name for feature in self.features]

    @property
    def has_weights(self) -> bool:
        """Return whether rows count differently, or for some tasks alone."""
        return self.weight is not None or bool(self.missing_labels)

    @property
    def number_names(self) -> list[str]:
        """Return the labels that are numbers."""
        return [number.name for number in self.numbers]

    def number(self, label: str) -> NumberLabel | None:
        """Return what is known of a label that is a number; None: it is binary."""
        return next((number for number in self.numbers if number.name == label), None)

    @property
    def together_column(self) -> str | None:
        """Return the shards' column of the groups whose rows lie together, None where rows were shuffled singly."""
        if self.together is None:
            return None
        return GROUP_COLUMN if self.together == self.group_id else TOGETHER_COLUMN

    @property
    def embedded(self) -> list[Feature]:
        """Return the features that have a table: all but those with given vectors."""
        return [feature for feature in self.features if feature.vectors is None]

    @property
    def weighted_lists(self) -> list[Feature]:
        """Return the list features whose items have weights."""
        return [feature for feature in self.features if feature.weights is not None]

    @property
    def weighted_tables(self) -> list[str]:
        """Return the tables that are looked up with weights, also by features that share one with a weighted list."""
        return list(dict.fromkeys(feature.table for feature in self.weighted_lists))

    @property
    def dense_names(self) -> list[str]:
        """Return the columns that a batch's ``dense`` is made of: dense ones, then vectors of rows."""
        return [*(column.name for column in self.dense), *(vector.name for vector in self.row_vectors)]

    @property
    def dense_widths(self) -> list[int]:
        """Return how many columns of a batch's ``dense`` each of ``dense_names`` has."""
        return [*(1 for _ in self.dense), *(vector.dim for vector in self.row_vectors)]

    @property
    def known_ids(self) -> set[str]:
        """Return ``dataset_id`` and those from before each addition."""
        return {self.dataset_id, *(addition.before for addition in self.additions)}

    def with_content_id(self) -> Schema:
        """Return the schema of shards that are written, its ``dataset_id`` now of their rows, too."""
        contents = {name: [shard.content for shard in split.shards] for name, split in self.splits.items()}
        digest = hashlib.sha256(canonical_json([self.dataset_id, contents]))
        update = {"dataset_id": digest.hexdigest()[:16], "shard_ids": [*self.shard_ids, self.dataset_id]}
        return self.model_copy(update=update)

    @property
    def same_tables_ids(self) -> set[str]:
        """Return the ``known_ids`` under which every value had the id, and every table the rows, that it has now."""
        found = {self.dataset_id}
        for addition in reversed(self.additions):
            if addition.grown:
                break
            found.add(addition.before)
        return found

    @property
    def trained_lookups(self) -> dict[str, Lookups]:
        """Return those of the rows that are trained on, per feature: the training split's, or of all days."""
        return self.lookups_of(self.days.names if self.days else ["train"])

    def lookups_of(self, splits: Sequence[str]) -> dict[str, Lookups]:
        """Return the sum of the splits' ``lookups`` of each feature that has some."""
        sums: dict[str, Lookups] = {}
        for split in splits:
            for name, found in self.splits[split].lookups.items() if split in self.splits else ():
                if name in self.feature_names:
                    sums[name] = sums[name] + found if name in sums else found
        return sums

    def new_from(self, day: str) -> dict[str, int]:
        """Return feature -> the first id that only the rows of ``day``, or of days after it, gave to a value."""
        for addition in self.additions:
            if day in addition.grown:
                return {name: size for name, size in addition.grown[day].items() if name in self.feature_names}
        return {}

    def select(self, features: Sequence[str] | None, labels: Sequence[str] | None) -> Schema:
        """Return the same dataset seen through some of its features and labels, in the order given (None: all).

        Args:
            features: names of features, of dense columns and of vectors of rows.

        Raises:
            UserError: a name the dataset does not have.
        """
        by_name = {feature.name: feature for feature in self.features}
        dense = {column.name: column for column in self.dense}
        rows = {vector.name: vector for vector in self.row_vectors}
        for kind, wanted, known in (
            ("feature", features, [*by_name, *self.dense_names]),
            ("label", labels, self.labels),
        ):
            for name in wanted or ():
                if name not in known:
                    raise UserError(f"{kind} {name!r} is not in dataset {self.name!r}; it has {', '.join(known)}")
        sequences = [sequence.select(features or self.feature_names) for sequence in self.sequences]
        if features and not any(name in by_name for name in features):
            raise UserError(f"features {', '.join(features)}: none of them has ids; name one that has")
        return self.model_copy(
            update={
                "features": [by_name[name] for name in features if name in by_name] if features else self.features,
                "dense": [dense[name] for name in features if name in dense] if features else self.dense,
                "row_vectors": [rows[name] for name in features if name in rows] if features else self.row_vectors,
                "sequences": [sequence for sequence in sequences if sequence is not None],
                "labels": list(labels) if labels else self.labels,
                "missing_labels": [name for name in self.missing_labels if not labels or name in labels],
                "numbers": [number for number in self.numbers if not labels or number.name in labels],
            }
        )

    def write(self, folder: Path) -> None:
        values = self.model_dump(mode="json")
        added = ("days", "additions", "shard_ids", "sequences", "weight", "missing_labels", "dense", "row_vectors")
        for key in (*added, "numbers", "together"):
            if not values[key]:  # so that programs from before there were any read it
                del values[key]
        for split in values["splits"].values():
            for key in ("counted", "groups"):
                if not split[key]:
                    del split[key]
        if self.negatives == 1:
            del values["negatives"]
        text = json.dumps({**values, CHECKSUM_KEY: _checksum(values)}, indent=1)
        (folder / SCHEMA_FILE).write_text(text + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Schema:
        """Read ``folder/schema.json``.

        Raises:
            UserError: no such file, not JSON, not a schema, or changed since it was written; the message names the
                file and the entry.
        """
        path = place(folder) / SCHEMA_FILE
        if not (os.path.lexists(path) if is_local(path) else path.exists()):
            raise UserError(f"{path}: no such file; prepare the dataset with tools/prepare_data.py first")
        text = read_text(path, MAX_SCHEMA_BYTES, "prepare the dataset again")
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UserError(f"{path}: not JSON of plain values: {error}") from None
        checksum = values.pop(CHECKSUM_KEY, None) if isinstance(values, dict) else None
        try:
            schema = cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{path}: not a schema of format {FORMAT_VERSION}: {first_problem(error)}") from None
        if checksum is not None and checksum != _checksum(values):
            raise UserError(
                f"{path}: changed since it was written, its {CHECKSUM_KEY} is another; prepare the dataset again, "
                f"or remove the {CHECKSUM_KEY} if you changed it on purpose"
            )
        return schema


def _checksum(values: dict[str, Any]) -> str:
    """Return the checksum of the content as it stands in the file, which keys added to ``Schema`` later leave alone."""
    return hashlib.sha256(canonical_json(values)).hexdigest()


def _refuse_repeated(what: str, names: Sequence[str]) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise UserError(f"{what} used more than once: {', '.join(repeated)}")
