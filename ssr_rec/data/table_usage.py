"""Counts how a dataset uses the tables it asks for: ids seen in training, their skew, what hashing makes collide."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from ssr_rec.data.features import AdmittedHashing, Feature, Hashing, RawHash
from ssr_rec.data.schema import Schema
from ssr_rec.data.splits import Lookups


@dataclass(frozen=True)
class Use:
    """Says how one feature's table is used, over the rows that are trained on.

    Attributes:
        table_rows: of its table; None: a config says (raw hashes).
        ids: distinct ids looked up.
        lookups: of its table: rows, or items of a list.
        missing, oov: shares of the lookups; nan without lookups, None where the encoding has no such id.
        top_id, top_percent: share of the lookups that the most frequent id has, and the most frequent 1 % (at least
            one) of the ids seen.
        values, values_ids: distinct values of a hashed feature in the log it was prepared from, and the ids they share;
            None: not hashed, or not measured when it was prepared.
    """

    name: str
    kind: str
    table_rows: int | None
    ids: int
    lookups: int
    missing: float | None
    oov: float | None
    top_id: float
    top_percent: float
    buckets: int | None = None
    values: int | None = None
    values_ids: int | None = None

    @property
    def used(self) -> float | None:
        """Return the share of the table's rows that training looks up."""
        return self.ids / self.table_rows if self.table_rows else None

    @property
    def load(self) -> float | None:
        """Return distinct values per bucket."""
        return self.values / self.buckets if self.values is not None and self.buckets else None

    @property
    def collisions(self) -> float | None:
        """Return the share of the values that did not get a bucket of their own: 1 - buckets in use / values."""
        return 1 - self.values_ids / self.values if self.values and self.values_ids is not None else None

    @property
    def expected_collisions(self) -> float | None:
        """Return ``collisions`` of a hash that draws its buckets at random."""
        return expected_collisions(self.values, self.buckets) if self.values and self.buckets else None

    def figures(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        derived = ("used", "load", "collisions", "expected_collisions")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def expected_collisions(values: int, buckets: int) -> float:
    """Return ``(n - b (1 - (1 - 1/b)^n)) / n``: of n values in b buckets, those beyond one per bucket in use."""
    # By expm1: with few values in many buckets, 1 less the share of empty ones would be all rounding.
    in_use = -math.expm1(values * math.log1p(-1 / buckets)) * buckets if buckets > 1 else 1.0
    return (values - in_use) / values


def table_use(folder: Path, schema: Schema, memory_limit: str = "1GB", threads: int | None = None) -> list[Use]:
    """Return the use of every feature's table by the training split, or by all days.

    Args:
        memory_limit: of the engine, which spills to a temporary folder beyond it.
    """
    splits = schema.days.names if schema.days else ["train"]
    paths = [str(folder / shard.path) for split in splits for shard in schema.splits[split].shards]
    settings: dict[str, str | int] = {"memory_limit": memory_limit, **({"threads": threads} if threads else {})}
    with TemporaryDirectory() as spill, duckdb.connect(config={**settings, "temp_directory": spill}) as engine:
        return [_use(engine, paths, feature, schema) for feature in schema.features]


def split_lookups(folder: Path, schema: Schema, memory_limit: str = "1GB") -> dict[str, dict[str, Lookups]]:
    """Return, for every split, each feature's missing and out-of-vocabulary values.

    They stand in the schema, but of datasets from before 2026-11-26, whose shards are read.
    """
    if all(split.lookups or not split.num_rows for split in schema.splits.values()):
        return {name: split.lookups for name, split in schema.splits.items()}
    found: dict[str, dict[str, Lookups]] = {}
    features = [f for f in schema.features if _missing(f) is not None]
    settings = {"memory_limit": memory_limit}
    with TemporaryDirectory() as spill, duckdb.connect(config={**settings, "temp_directory": spill}) as engine:
        for name, split in schema.splits.items():
            paths = [str(folder / shard.path) for shard in split.shards]
            found[name] = {f.name: _lookups(engine, paths, f) for f in features} if paths else {}
    return found


def _lookups(engine: duckdb.DuckDBPyConnection, paths: list[str], feature: Feature) -> Lookups:
    row = engine.execute(
        f"select count(*), count(*) filter (id = $missing), count(*) filter (id = $oov) "
        f"from (select {_ids(feature)} id from read_parquet($paths))",
        {"paths": paths, "missing": _missing(feature), "oov": _oov(feature)},
    ).fetchone()
    assert row is not None
    return Lookups(total=row[0], missing=row[1], oov=row[2])


def _ids(feature: Feature) -> str:
    """Return SQL of the ids of a feature, one a row."""
    column = '"' + feature.name.replace('"', '""') + '"'
    return f"unnest({column})" if feature.kind == "list" else column


def _use(engine: duckdb.DuckDBPyConnection, paths: list[str], feature: Feature, schema: Schema) -> Use:
    # Ids by how often they occur: as many lines as there are different counts, whatever the table.
    lines = engine.execute(
        f"select n, count(*), count(*) filter (id = $missing) > 0, count(*) filter (id = $oov) > 0 from "
        f"(select id, count(*) n from (select {_ids(feature)} id from read_parquet($paths)) group by id) "
        "group by n order by n desc",
        {"paths": paths, "missing": _missing(feature), "oov": _oov(feature)},
    ).fetchall()
    lookups, distinct = sum(n * many for n, many, *_ in lines), sum(line[1] for line in lines)

    def share(place: int) -> float:
        return sum(line[0] for line in lines if line[place]) / lookups if lookups else math.nan

    left, top = max(1, distinct // 100), 0
    for n, many, *_ in lines:
        top += n * min(many, left)
        left -= min(many, left)
    hashed = schema.preparation.get("hashed", {}).get(feature.name, {}) if not schema.additions else {}
    return Use(
        name=feature.name,
        kind=feature.encoding.type,
        table_rows=None if isinstance(feature.encoding, RawHash) else feature.num_embeddings,
        ids=distinct,
        lookups=lookups,
        missing=None if _missing(feature) is None else share(2),
        oov=None if _oov(feature) is None else share(3),
        top_id=lines[0][0] / lookups if lookups else math.nan,
        top_percent=top / lookups if lookups else math.nan,
        buckets=feature.encoding.num_buckets if isinstance(feature.encoding, (Hashing, AdmittedHashing)) else None,
        values=hashed.get("values"),
        values_ids=hashed.get("ids"),
    )


def _missing(feature: Feature) -> int | None:
    return getattr(feature.encoding, "missing_id", None)


def _oov(feature: Feature) -> int | None:
    return getattr(feature.encoding, "oov_id", None)
