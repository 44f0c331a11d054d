"""What a prepared dataset is: features, cardinalities, labels, group id, splits; read and written as schema.json.

A prepared dataset is a folder: ``schema.json``, parquet shards of each split, and the fitted vocabularies.
In a shard, a single-valued feature is an int64 column of ids, a list feature a ``list<int64>`` column,
a label an int8 column of 0 and 1, and the evaluation group (GAUC) the int64 column ``GROUP_COLUMN``.
No column holds nulls: a missing value already has an id of its own, a missing list is empty.

Damage shows: ``schema.json`` holds a checksum of its own content and one of each shard's footer, and the pages of a
shard hold theirs (``data/shards.py``). Datasets from before there were checksums are read without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ssr_rec.places import is_local, place
from ssr_rec.plain import parse_json, read_text
from ssr_rec.settings import Settings

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"
GROUP_COLUMN = "__group_id__"
DATASET_ID_KEY = b"ssr_rec.dataset_id"
"""Key of the parquet file metadata that ties a shard to its schema."""
SHARD_KEY = b"ssr_rec.shard"
"""Key of the parquet file metadata that says which shard it is, so that no two footers are equal."""

CHECKSUM_KEY = "checksum"
"""Key of ``schema.json`` beside those of ``Schema``."""
MAX_SCHEMA_BYTES = 2**26
"""Some 300,000 shards, or 100,000 features."""

SPLITS = ("train", "validation", "test")


def _within(path: str) -> str:
    inner = PurePosixPath(path)
    if not inner.parts or inner.is_absolute() or ".." in inner.parts:
        raise ValueError("must be a path within the dataset folder")
    return str(inner)


InnerPath = Annotated[str, AfterValidator(_within)]
"""A path relative to the dataset folder that does not leave it."""
Column = Annotated[str, Field(max_length=1000)]
"""Longer, and no message that names it could be read."""


class Vocabulary(Settings):
    """Ids by descending training-split frequency; ``missing_id`` for null, ``oov_id`` for rare and unseen values."""

    type: Literal["vocabulary"] = "vocabulary"
    column: str
    min_count: int = Field(ge=1, description="occurrences in the training split that earn an id of its own")
    missing_id: int = 0
    oov_id: int = 1
    file: InnerPath = Field(description="parquet of (value: string, id: int64, count: int64), relative to the dataset")


class Hashing(Settings):
    """``id = first_id + md5(value) mod num_buckets``; no vocabulary, collisions possible, servable anywhere."""

    type: Literal["hash"] = "hash"
    column: str
    num_buckets: int = Field(ge=1)
    missing_id: int = 0
    first_id: int = 1


class AdmittedHashing(Settings):
    """``first_id + md5(value) mod num_buckets`` for values frequent in training; ``oov_id`` for all others."""

    type: Literal["admitted_hash"] = "admitted_hash"
    column: str
    num_buckets: int = Field(ge=1)
    min_count: int = Field(ge=2, description="occurrences in the training split that admit a value")
    missing_id: int = 0
    oov_id: int = 1
    first_id: int = 2
    file: InnerPath = Field(description="parquet of the admitted values, as that of a vocabulary")


class RawHash(Settings):
    """``1 + the first 60 bits of md5(value)``: ids without end, for tables that admit and evict them in training."""

    type: Literal["raw_hash"] = "raw_hash"
    column: str
    missing_id: int = 0


class LogBuckets(Settings):
    """Equal-width buckets of ``sign(v) * log1p(|v|)`` between the training split's extremes; outside is clipped."""

    type: Literal["log_buckets"] = "log_buckets"
    column: str
    low: float = Field(description="smallest transformed training value")
    high: float = Field(description="largest transformed training value")
    num_buckets: int = Field(ge=1)
    missing_id: int = 0
    first_id: int = 1


class Drawn(Settings):
    """The column is born as ids (synthetic log)."""

    type: Literal["drawn"] = "drawn"
    column: str


Encoding = Annotated[Vocabulary | Hashing | AdmittedHashing | RawHash | LogBuckets | Drawn, Field(discriminator="type")]
RAW_HASHES = 2**60 + 1
MAX_EMBEDDINGS = 2**40
"""Of a table."""


LISTED = (Vocabulary, AdmittedHashing)
"""Encodings that know their values by a file."""


class Feature(Settings):
    name: Column
    kind: Literal["categorical", "numeric", "list"]
    num_embeddings: int = Field(ge=1, le=RAW_HASHES, description="ids lie in [0, num_embeddings)")
    encoding: Encoding = Field(description="how the column was made")
    max_length: int | None = Field(None, ge=1, description="list features: most ids a row holds")

    @model_validator(mode="after")
    def _list_has_length(self) -> Feature:
        if (self.kind == "list") != (self.max_length is not None):
            raise ValueError(f"feature {self.name!r}: max_length is for list features, and a list feature needs it")
        if self.num_embeddings > MAX_EMBEDDINGS and not isinstance(self.encoding, RawHash):
            raise ValueError(f"feature {self.name!r}: num_embeddings: should be less than or equal to {MAX_EMBEDDINGS}")
        return self


class Shard(Settings):
    path: InnerPath
    num_rows: int = Field(ge=0)
    footer: str | None = Field(None, description="sha256 of the file's parquet footer; None: written without")
    group_rows: int | None = Field(
        None, ge=1, description="rows of every row group but the last; None: the footer says, as in older datasets"
    )


class Split(Settings):
    num_rows: int = Field(ge=0)
    positive_rate: dict[str, float] = Field(description="per label")
    shards: list[Shard]


class Ceiling(Settings):
    """What the true probabilities of a synthetic log reach on a split: no model can do better but by luck."""

    auc: float
    logloss: float = Field(description="nats per row")


class Days(Settings):
    """The splits of a dataset are days."""

    names: list[str] = Field(min_length=2, description="the splits, in order of time")
    fitted: int = Field(ge=1, description="vocabularies and bucket ranges are those of so many first days")


class Addition(Settings):
    """Days added to a dataset after it was made (``data/add.py``)."""

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
    dataset_id: str = Field(description="also in every shard's file metadata; a mismatch means mixed datasets")
    features: list[Feature] = Field(min_length=1)
    labels: list[Column] = Field(min_length=1)
    group_id: str | None = Field(None, description="raw column behind GROUP_COLUMN, the users of GAUC")
    splits: dict[str, Split]
    days: Days | None = Field(None, description="None: the splits are train, validation and test")
    additions: list[Addition] = Field(default_factory=list, description="in the order they were made")
    ceiling: dict[str, dict[str, Ceiling]] = Field(default_factory=dict, description="split -> label, synthetic only")
    preparation: dict[str, Any] = Field(default_factory=dict, description="what made it: preset, seed, split rule")

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        _refuse_repeated("names", [*self.feature_names, *self.labels, GROUP_COLUMN])
        for split_name, split in self.splits.items():
            _refuse_repeated(f"split {split_name!r}: shards", [shard.path for shard in split.shards])
            if split.num_rows != sum(shard.num_rows for shard in split.shards):
                raise ValueError(f"split {split_name!r}: num_rows is not the sum over its shards")
        if self.days is not None:
            _refuse_repeated("days", self.days.names)
            if set(self.days.names) != set(self.splits) or self.days.fitted >= len(self.days.names):
                raise ValueError("days: its names must be the splits, and fitted fewer than there are")
        added = [day for addition in self.additions for day in addition.days]
        if added and (self.days is None or self.days.names[-len(added) :] != added):
            raise ValueError("additions: their days must be the last of days.names")
        vocabularies = {feature.name for feature in self.features if isinstance(feature.encoding, Vocabulary)}
        for addition in self.additions:
            if not set(addition.grown) <= set(addition.days):
                raise ValueError("additions: grown names a day that was not added")
            for sizes in addition.grown.values():
                if not set(sizes) <= vocabularies:
                    raise ValueError("additions: grown names a feature without a vocabulary")
        return self

    @property
    def feature_names(self) -> list[str]:
        return [feature.name for feature in self.features]

    @property
    def known_ids(self) -> set[str]:
        """``dataset_id``, and those from before each addition, which older shards carry."""
        return {self.dataset_id, *(addition.before for addition in self.additions)}

    @property
    def same_tables_ids(self) -> set[str]:
        """Those of ``known_ids`` under which every value had the id, and every table the rows, that it has now."""
        found = {self.dataset_id}
        for addition in reversed(self.additions):
            if addition.grown:
                break
            found.add(addition.before)
        return found

    def new_from(self, day: str) -> dict[str, int]:
        """Feature -> the first id that only the rows of ``day``, or of days after it, gave to a value."""
        for addition in self.additions:
            if day in addition.grown:
                return {name: size for name, size in addition.grown[day].items() if name in self.feature_names}
        return {}

    def select(self, features: Sequence[str] | None, labels: Sequence[str] | None) -> Schema:
        """The same dataset seen through some of its features and labels, in the order given (None: all).

        Raises:
            ValueError: a name the dataset does not have.
        """
        by_name = {feature.name: feature for feature in self.features}
        for kind, wanted, known in (("feature", features, list(by_name)), ("label", labels, self.labels)):
            for name in wanted or ():
                if name not in known:
                    raise ValueError(f"{kind} {name!r} is not in dataset {self.name!r}; it has {', '.join(known)}")
        return self.model_copy(
            update={
                "features": [by_name[name] for name in features] if features else self.features,
                "labels": list(labels) if labels else self.labels,
            }
        )

    def write(self, folder: Path) -> None:
        values = self.model_dump(mode="json")
        for key in ("days", "additions"):
            if not values[key]:  # so that programs from before there were any read it
                del values[key]
        text = json.dumps({**values, CHECKSUM_KEY: _checksum(values)}, indent=1)
        (folder / SCHEMA_FILE).write_text(text + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Schema:
        """Read ``folder/schema.json``.

        Raises:
            ValueError: no such file, not JSON, not a schema, or changed since it was written; the message names the
                file and the entry.
        """
        path = place(folder) / SCHEMA_FILE
        if not (os.path.lexists(path) if is_local(path) else path.exists()):
            raise ValueError(f"{path}: no such file; prepare the dataset with tools/prepare_data.py first")
        text = read_text(path, MAX_SCHEMA_BYTES, "prepare the dataset again")
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON of plain values: {error}") from None
        checksum = values.pop(CHECKSUM_KEY, None) if isinstance(values, dict) else None
        try:
            schema = cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{path}: not a schema of format {FORMAT_VERSION}: {first_problem(error)}") from None
        if checksum is not None and checksum != _checksum(values):
            raise ValueError(
                f"{path}: changed since it was written, its {CHECKSUM_KEY} is another; prepare the dataset again, "
                f"or remove the {CHECKSUM_KEY} if you changed it on purpose"
            )
        return schema


def _checksum(values: dict[str, Any]) -> str:
    """Of the content as it stands in the file, so that keys added to ``Schema`` later leave it as it is."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _refuse_repeated(what: str, names: Sequence[str]) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"{what} used more than once: {', '.join(repeated)}")


def first_problem(error: ValidationError) -> str:
    """The first complaint of a pydantic error as ``where: what (got value)``, on one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "top level"
    # pydantic repeats an unknown tag in its message, however long it is.
    what = problem["msg"] if len(problem["msg"]) <= 600 else f"{problem['msg'][:300]} ... {problem['msg'][-300:]}"
    return " ".join(f"{where}: {what} (got {str(problem['input'])[:80]!r})".split())
