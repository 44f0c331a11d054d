"""Finds the row of an older run's table that means what a row means here: ids are of a dataset, values are not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ssr_rec.checkpointing.format import read_info
from ssr_rec.checkpointing.manager import TRAINING, list_checkpoints
from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import place, source
from ssr_rec.data.features import AdmittedHashing, Drawn, Encoding, Feature, Hashing, LogBuckets, RawHash, Vocabulary
from ssr_rec.data.given_vectors import stored_vectors
from ssr_rec.data.schema import Schema

logger = logging.getLogger(__name__)

TASKS = ".tasks"
"""In ``row_maps``, and the name of no table: of tensors whose first dim is the labels, with names in ``OF_TASKS``."""
TABLE = re.compile(r"\.embedding_bags\.([^.]+)\.weight")
OF_DOMAINS = re.compile(r"\.(per_domain\.[^.]+)\.")
"""In the name of a tensor whose first dim is the domains: the column's ids, which mean what its table's rows do."""
OF_TASKS = re.compile(r"\.dense\.heads\.(?!per_domain\.)|[/.]loss\.log_variances")


class Origin(NamedTuple):
    """Names the data that the weights of a checkpoint are of.

    Attributes:
        dataset_id: of the dataset that was trained on.
        data: the run's ``data`` settings as JSON values; of ``path``, ``features`` and ``labels`` those that were set.
    """

    dataset_id: str
    data: Mapping[str, Any]


class Here(NamedTuple):
    """Describes the dataset of the run that begins: its folder, and its schema with the features and labels trained."""

    folder: Path
    schema: Schema


class RowMap(NamedTuple):
    """Maps each row of a table to its old row.

    Attributes:
        rows: int64, one entry a row of the table here: the row of the old table that means the same value, or -1.
        old_size: rows of the old table.
    """

    rows: Tensor
    old_size: int


def origin_of(folder: Path) -> Origin | None:
    """Return what a checkpoint was trained on; None: it is of before that was written, and no other one is beside it.

    Raises:
        UserError: its checkpoint.json is damaged.
    """
    # Best weights of before 2026-11-26 do not say; the run's training checkpoints do.
    for found in (folder, *list_checkpoints(folder.parent, TRAINING)[:1]):
        info = read_info(found)
        dataset_id = info.get("dataset_id") or (info.get("position") or {}).get("dataset_id")
        if isinstance(dataset_id, str) and isinstance(info.get("config"), dict):
            data = info["config"].get("data")
            return Origin(dataset_id, data if isinstance(data, dict) else {})
    return None


def row_maps(folder: Path, here: Here) -> dict[str, RowMap]:
    """Return, for every table whose ids have other meanings in the two datasets, the old row of each row here.

    ``TASKS`` is among them where the labels are others, or of another kind: the old place of each label, by its name.

    For a table that is not among them, rows that both tables have mean the same value. Values of a vocabulary are
    matched by their text, numeric buckets by their middle, rows of missing and of out-of-vocabulary values by what
    they are. Nothing matches where a column was encoded in two ways that have no value in common.

    Raises:
        UserError: the vocabularies of the checkpoint's dataset are needed and no longer there, or features or labels
            are in another order.
    """
    origin = origin_of(folder)
    schema, start = here.schema, f"warm_start={folder}"
    if origin is None:
        raise UserError(
            f"{start}: nothing says which dataset its weights are of, so a row of its tables could mean any value; "
            "start from a checkpoint within its run folder, beside a training checkpoint"
        )
    if origin.dataset_id in {*schema.known_ids, *schema.shard_ids}:
        there = Schema.read(here.folder)
        _check_order(start, origin, there, schema)
        return _labels(origin, there, schema)
    path = origin.data.get("path")
    if path is None:  # a synthetic log, whose ids are its values
        other = [feature for feature in schema.features if not isinstance(feature.encoding, Drawn)]
        return {feature.table: RowMap(_nothing(feature), 0) for feature in other}
    try:
        there = Schema.read(path)
        problem = f"{path} holds dataset {there.dataset_id} now"
        is_it = origin.dataset_id in {*there.known_ids, *there.shard_ids}
    except (ValueError, OSError) as error:
        problem, is_it = str(error), False
    if not is_it:
        raise UserError(
            f"{start}: trained on dataset {origin.dataset_id} of {path}, this run has {schema.dataset_id}; the same id "
            f"means other values, and the vocabularies that would tell are gone: {problem}. Keep the old dataset in "
            "its place, or add days to it (--add-to) instead of preparing it anew"
        )
    _check_order(start, origin, there, schema)
    _check_numbers(start, Here(place(path), there), here)
    old = {feature.name: feature for feature in there.features}
    maps = _labels(origin, there, schema)
    for feature in schema.features:
        before = old.get(feature.name)
        if before is None:
            continue
        if _length(before) != _length(feature):
            # Columns of a table are rounded up, so that other vectors may fit it.
            maps[feature.table] = RowMap(_nothing(feature), before.num_embeddings)
        elif not _same(before.encoding, place(path), feature.encoding, here.folder):
            rows = _map(before.encoding, place(path), feature, here.folder)
            maps[feature.table] = RowMap(rows, before.num_embeddings)
    return maps


def _labels(origin: Origin, there: Schema, here: Schema) -> dict[str, RowMap]:
    """Return the old place of each label here, -1 of one that is new or was of another kind; {}: all have their own."""
    before = list(origin.data.get("labels") or there.labels)
    same = {label for label in before if (there.number(label) is None) == (here.number(label) is None)}
    places = [before.index(label) if label in same else -1 for label in here.labels]
    return {} if places == [*range(len(before))] else {TASKS: RowMap(torch.tensor(places), len(before))}


def _length(feature: Feature) -> int | None:
    """Return how long the vectors are that a feature is given; None: it is given none."""
    return feature.vectors.dim if feature.vectors is not None else None


def _check_order(start: str, origin: Origin, there: Schema, here: Schema) -> None:
    """Refuse features, dense columns or labels in another order, in which every weight would still fit."""
    for key, all_there, names in (
        ("features", there.feature_names, here.feature_names),
        ("features", there.dense_names, here.dense_names),
        ("labels", there.labels, here.labels),
    ):
        chosen = origin.data.get(key)
        before = [name for name in chosen if name in all_there] if chosen else all_there
        if before != names and sorted(before) == sorted(names):
            whole = chosen or (all_there if key == "labels" else [*there.feature_names, *there.dense_names])
            raise UserError(
                f"{start}: its {key} are in another order, {', '.join(before)}; the over-arch tells them apart by "
                f"their place, so give this run --data.{key}={json.dumps(whole)}"
            )


def _check_numbers(start: str, there: Here, here: Here) -> None:
    """Refuse numbers that mean something else now, behind which every weight would still fit.

    Of labels it only warns: their predictions are off until the heads have learned the new scale.

    Raises:
        UserError: names the dense column, or the vectors and a value.
    """
    instead = "leave it out by data.features, or begin without --warm_start"
    scales = {column.name: column.scale for column in there.schema.dense}
    for column in here.schema.dense:
        if (before := scales.get(column.name, column.scale)) != column.scale:
            raise UserError(
                f"{start}: dense column {column.name!r} is scaled by {column.scale} here and was by {before}; "
                f"prepare the log with that scale, {instead}"
            )
    of_labels = {label.name: label for label in there.schema.numbers}
    for label in here.schema.numbers:
        older = of_labels.get(label.name, label)
        pairs = [(getattr(older, key), getattr(label, key)) for key in ("mean", "std", "log_mean", "log_std")]
        if any(before != now for before, now in pairs):
            logger.warning(
                f"{start}: the weights predict {label.name!r} in units of mean {older.mean:g} and deviation "
                f"{older.std:g}, this dataset has {label.mean:g} and {label.std:g}: predictions are off at first"
            )
    features = {feature.name: feature for feature in there.schema.features}
    for feature in here.schema.features:
        old = features.get(feature.name, feature)
        if feature.vectors is None or _length(old) != _length(feature):
            continue
        (before, rows), (now, new_rows) = (_vectors(one, side.folder) for one, side in ((old, there), (feature, here)))
        common = pc.index_in(now["value"], value_set=before["value"]).to_pandas()
        known = common.notna().to_numpy()
        was = rows[before["id"].to_numpy()[common[known].astype("int64").to_numpy()]]
        differs = (was != new_rows[now["id"].to_numpy()[known]]).any(axis=1)
        if differs.any():
            value = now["value"].filter(pa.array(known))[int(differs.argmax())].as_py()
            raise UserError(
                f"{start}: vectors {feature.name!r} are others than those it was trained on, such as that of "
                f"{value!r}; give it those, {instead}"
            )


def _vectors(feature: Feature, folder: Path) -> tuple[pa.Table, np.ndarray]:
    """Return (value, id) of a feature that has given vectors, and these (num_embeddings, E)."""
    assert isinstance(feature.encoding, Vocabulary)
    return _table(feature.encoding, folder).combine_chunks(), stored_vectors(feature, folder)


def _same(old: Encoding, there: Path, new: Encoding, here: Path) -> bool:
    """Return whether the ids that both encodings give mean the same values."""
    if isinstance(old, Vocabulary) and isinstance(new, Vocabulary):
        before, now = _values(old, there), _values(new, here)
        fewer = min(len(before), len(now))
        same = (old.missing_id, old.oov_id) == (new.missing_id, new.oov_id)
        return same and before.slice(0, fewer).equals(now.slice(0, fewer))
    if isinstance(old, Hashing | AdmittedHashing) and isinstance(new, Hashing | AdmittedHashing):
        return (old.type, old.num_buckets) == (new.type, new.num_buckets)
    if isinstance(old, Drawn | RawHash):
        return type(old) is type(new)
    return old == new


def _nothing(feature: Feature) -> Tensor:
    return torch.full((feature.num_embeddings,), -1, dtype=torch.int64)


def _map(old: Encoding, there: Path, feature: Feature, here: Path) -> Tensor:
    """Return the old row of each row of a feature's table here, -1 where there is none."""
    new, rows = feature.encoding, _nothing(feature)
    if isinstance(old, Drawn | RawHash) or isinstance(new, Drawn | RawHash):
        return rows
    rows[new.missing_id] = old.missing_id
    if isinstance(old, Vocabulary | AdmittedHashing) and isinstance(new, Vocabulary | AdmittedHashing):
        rows[new.oov_id] = old.oov_id
    if isinstance(old, Vocabulary) and isinstance(new, Vocabulary):
        before, now = _table(old, there), _table(new, here)
        found = pc.index_in(now["value"], value_set=before["value"].combine_chunks()).to_pandas()
        known = found.notna().to_numpy()
        ids = torch.from_numpy(now["id"].to_numpy()[known])
        rows[ids] = torch.from_numpy(before["id"].to_numpy()[found[known].astype("int64").to_numpy()])
    if isinstance(old, LogBuckets) and isinstance(new, LogBuckets):
        middle = new.low + (torch.arange(new.num_buckets, dtype=torch.float64) + 0.5) * (
            (new.high - new.low) / new.num_buckets
        )
        width = (old.high - old.low) / old.num_buckets
        position = ((middle - old.low) / width).floor() if width > 0 else torch.zeros_like(middle)
        rows[new.first_id : new.first_id + new.num_buckets] = (
            old.first_id + position.clip(0, old.num_buckets - 1).long()
        )
    return rows


def _table(encoding: Vocabulary, folder: Path) -> pa.Table:
    return pq.read_table(source(folder / encoding.file), columns=["value", "id"])


def _values(encoding: Vocabulary, folder: Path) -> pa.ChunkedArray:
    """Return the values of a vocabulary in the order of their ids."""
    return _table(encoding, folder).sort_by("id")["value"]


def feature_of(name: str) -> str | None:
    """Return the feature, or shared vocabulary, whose table or optimizer's state a tensor is; None: it is none.

    Of a domain's parameters it is ``per_domain.COLUMN``.
    """
    if of_domains := OF_DOMAINS.search(name):
        return of_domains.group(1)
    found = TABLE.search(name)
    return found.group(1).partition("@")[0] if found else None


COLLECTION = re.compile(r"\.(weighted_)?tables(?=\.embedding_bags\.)")


def names_there(names: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """Return the name in a checkpoint of each tensor here.

    It is the same but for a table whose list has got weights since, or has them no longer: that is in another
    collection now, and means the same values.
    """
    of_tables = {COLLECTION.sub(".tables", name): name for name in stored}
    return {name: name if name in stored else of_tables.get(COLLECTION.sub(".tables", name), name) for name in names}


def taken(value: Tensor, old: Tensor, rows: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Return what a shard of a table, or of its optimizer's state, holds when rows are taken from the old table.

    Args:
        value: the shard; where ``rows`` has no old row, its own values stay.
        old: the whole old tensor.
        rows: those of a ``RowMap``.
        offsets: of the shard within the table.
    """
    own = rows[offsets[0] : offsets[0] + len(value)]
    known = own >= 0
    found = old[own[known]]
    if value.dim() > 1:
        found = found[:, offsets[1] : offsets[1] + value.shape[1]]
    result = value.detach().clone()
    result[known.to(value.device)] = found.to(value.device, value.dtype)
    return result
