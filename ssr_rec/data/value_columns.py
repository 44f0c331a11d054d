"""Finds the columns with one id a row and few of them, such as a domain, and names the values behind the ids."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import source
from ssr_rec.data.features import LISTED, Drawn, Feature, LogBuckets, Vocabulary
from ssr_rec.data.schema import Schema

MOST_DOMAINS = 64
"""Ids of a domain column; every one has weights of its own."""
MOST_VALUES = 256
"""Ids of a column by whose values metrics are given."""


class ValueColumn(NamedTuple):
    """Names a column by whose values rows are told apart, and the value of each id."""

    name: str
    names: list[str]


def ids_of(sparse: KeyedJaggedTensor, name: str) -> Tensor:
    """Return the ids (B,) of a single-valued feature of a batch."""
    place, ends = sparse.keys().index(name), sparse.offset_per_key()
    return sparse.values()[ends[place] : ends[place + 1]]


def domain_feature(schema: Schema, name: str) -> Feature:
    """Return the feature that ``domain`` names.

    Raises:
        UserError: no feature of the run, a list, numbers, hashed values, or too many values; says what to do.
    """
    feature = _single(schema, "domain", name, MOST_DOMAINS)
    if not isinstance(feature.encoding, Vocabulary | Drawn):
        kind = "numbers in buckets" if isinstance(feature.encoding, LogBuckets) else "hashed, so that values share ids"
        raise UserError(
            f"domain: {name!r} of {schema.name!r} is {kind}; a domain is a categorical column with a vocabulary: "
            "prepare the log with one"
        )
    return feature


def value_column(schema: Schema, name: str, folder: Path) -> ValueColumn:
    """Return the column that ``train.metrics_by`` names, of the dataset in ``folder``.

    Raises:
        UserError: no feature of the run, a list, or too many values; says what to do.
    """
    feature = _single(schema, "train.metrics_by", name, MOST_VALUES)
    return ValueColumn(name, value_names(feature, folder, np.arange(feature.num_embeddings)))


def _single(schema: Schema, key: str, name: str, most: int) -> Feature:
    found = next((feature for feature in schema.features if feature.name == name), None)
    if found is None:
        having = ", ".join(f.name for f in schema.features if f.kind != "list" and f.num_embeddings <= most) or "none"
        raise UserError(
            f"{key}: {name!r} is no feature of this run on {schema.name!r}; those that can be: {having}. Name it in "
            "data.features, or prepare the log with it"
        )
    if found.kind == "list":
        raise UserError(f"{key}: {name!r} of {schema.name!r} is a list; name a column with one value a row")
    if found.num_embeddings > most:
        raise UserError(
            f"{key}: {name!r} of {schema.name!r} has {found.num_embeddings:,} ids, more than {most}; name a column of "
            "fewer values, or prepare the log with a larger min_count for it"
        )
    return found


def value_names(feature: Feature, folder: Path, ids: np.ndarray) -> list[str]:
    """Return what each id of a feature stands for.

    Args:
        feature: how its ids were made.
        folder: the prepared dataset, for the vocabulary.
        ids: ``(n,)``.
    """
    encoding = feature.encoding
    special = {getattr(encoding, "missing_id", None): "(missing)", getattr(encoding, "oov_id", None): "(unknown)"}
    if isinstance(encoding, LogBuckets):
        return [special.get(i) or f"about {encoding.middle(i):.4g}" for i in ids.tolist()]
    if isinstance(encoding, LISTED):
        table = pq.read_table(source(folder / encoding.file), columns=["value", "id"])
        known = table.column("id").to_numpy()
        # A hash may give several values one id; the first named is one of them.
        places = dict(zip(known[::-1].tolist(), range(len(known) - 1, -1, -1), strict=True))
        column = table.column("value")
        return [special.get(i) or (column[places[i]].as_py() if i in places else f"id {i}") for i in ids.tolist()]
    return [special.get(i) or f"id {i}" for i in ids.tolist()]
