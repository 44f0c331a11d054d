"""Describes a feature of a prepared dataset: name, kind, table size, and the encoding that made ids of raw values."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings


def _within(path: str) -> str:
    inner = PurePosixPath(path)
    if not inner.parts or inner.is_absolute() or ".." in inner.parts:
        raise UserError("must be a path within the dataset folder")
    return str(inner)


InnerPath = Annotated[str, AfterValidator(_within)]
"""A path relative to the dataset folder that does not leave it."""
Column = Annotated[str, Field(max_length=1000)]
"""Longer, and no message that names it could be read."""


class Vocabulary(Settings):
    """Gives ids by falling count in training, or spread (``spread_ids``); null is ``missing_id``, others ``oov_id``."""

    type: Literal["vocabulary"] = "vocabulary"
    column: str
    min_count: int = Field(ge=1, description="occurrences in the training split that earn an id of its own")
    missing_id: int = 0
    oov_id: int = 1
    file: InnerPath = Field(description="parquet of (value: string, id: int64, count: int64), relative to the dataset")


class Hashing(Settings):
    """Gives ``first_id + md5(value) mod num_buckets`` as id; no vocabulary, collisions possible, servable anywhere."""

    type: Literal["hash"] = "hash"
    column: str
    num_buckets: int = Field(ge=1)
    missing_id: int = 0
    first_id: int = 1


class AdmittedHashing(Settings):
    """Gives ``first_id + md5(value) mod num_buckets`` to values frequent in training, and ``oov_id`` to all others."""

    type: Literal["admitted_hash"] = "admitted_hash"
    column: str
    num_buckets: int = Field(ge=1)
    min_count: int = Field(ge=2, description="occurrences in the training split that admit a value")
    missing_id: int = 0
    oov_id: int = 1
    first_id: int = 2
    file: InnerPath = Field(description="parquet of the admitted values, as that of a vocabulary")


class RawHash(Settings):
    """Gives ``1 + the first 60 bits of md5(value)``, ids without end for tables that admit and evict in training."""

    type: Literal["raw_hash"] = "raw_hash"
    column: str
    missing_id: int = 0


class LogBuckets(Settings):
    """Cuts ``sign(v) * log1p(|v|)`` into equal-width buckets between the training split's extremes; clips outside."""

    type: Literal["log_buckets"] = "log_buckets"
    column: str
    low: float = Field(description="smallest transformed training value")
    high: float = Field(description="largest transformed training value")
    num_buckets: int = Field(ge=1)
    missing_id: int = 0
    first_id: int = 1

    def middle(self, identity: int) -> float:
        """Return the number in the middle of an id's bucket."""
        width = (self.high - self.low) / self.num_buckets
        transformed = self.low + (identity - self.first_id + 0.5) * width
        return math.copysign(math.expm1(abs(transformed)), transformed)


class Drawn(Settings):
    """The column is born as ids (synthetic log)."""

    type: Literal["drawn"] = "drawn"
    column: str


class GivenVectors(Settings):
    """Says where the vectors of a feature's ids are, which are given and not learned from the log."""

    dim: int = Field(ge=1, description="E, the entries of each")
    file: InnerPath = Field(description="npy (num_embeddings, E) float32, relative to the dataset")


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
    vocabulary: Column | None = Field(None, description="shared with other features, as is the table of that name")
    vectors: GivenVectors | None = Field(None, description="those of its ids, instead of a table that is learned")
    weights: Column | None = Field(None, description="of a list's items: their raw column, or the mark before each one")

    @model_serializer(mode="wrap")
    def _without_none(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A feature without is written, and counts for a dataset_id, as before there were such keys.
        found: dict[str, Any] = values(self)
        for key in ("vocabulary", "vectors", "weights"):
            if getattr(self, key) is None:
                found.pop(key, None)
        return found

    @property
    def table(self) -> str:
        """Return the name of its embedding table."""
        return self.vocabulary or self.name

    @model_validator(mode="after")
    def _list_has_length(self) -> Feature:
        if (self.kind == "list") != (self.max_length is not None):
            raise UserError(f"feature {self.name!r}: max_length is for list features, and a list feature needs it")
        if self.weights is not None and (self.kind != "list" or isinstance(self.encoding, LogBuckets)):
            raise UserError(f"feature {self.name!r}: weights are for lists of ids")
        if self.num_embeddings > MAX_EMBEDDINGS and not isinstance(self.encoding, RawHash):
            raise UserError(f"feature {self.name!r}: num_embeddings: should be less than or equal to {MAX_EMBEDDINGS}")
        return self
