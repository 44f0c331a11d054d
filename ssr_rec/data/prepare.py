"""Turn a raw click log into a prepared dataset: split, fit on the training rows, encode, shuffle, write.

The protocol is that of the SSR paper, section 4.1.1: numbers are log-transformed and cut into buckets, and values
seen at most five times in the training split share one out-of-vocabulary id. docs/data.md defines every step.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from ibis.expr.types import BooleanValue, Table

from ssr_rec.data.encode import Lookup, encode
from ssr_rec.data.engine import ROW, Progress
from ssr_rec.data.engines import SparkSettings, connect
from ssr_rec.data.fit import Plan, count_splits, fit, make_plan, measured
from ssr_rec.data.grown import staged_as
from ssr_rec.data.shards import new_dataset
from ssr_rec.data.sources import Log, Read, find_files, read_table
from ssr_rec.data.split import ORDER, SPLIT, with_group
from ssr_rec.data.table_spec import DaySplit, TableSpec
from ssr_rec.schema import LISTED, RAW_HASHES, Days, Feature, LogBuckets, RawHash, Schema, Split, Vocabulary


def prepare(
    inputs: Sequence[str],
    output: Path,
    spec: TableSpec,
    *,
    read: Read = read_table,
    seed: int = 0,
    memory_limit: str = "3GB",
    threads: int | None = None,
    preset: str = "table",
    spark: SparkSettings | None = None,
) -> Schema:
    """Prepare the log in ``inputs`` (files, folders, globs, URLs of them) as the dataset folder ``output``.

    The result is the same for the same rows in the same order, spec and seed, whatever the number of threads or
    files and whichever the engine. ``output`` appears whole or not at all.

    Args:
        seed: of the random split and of the shuffle.
        spark: prepare on this Spark instead of DuckDB; the result is the same.
        output: a path, or a ``place`` in an object store.
        memory_limit: of the engine, which spills to a temporary folder beside ``output`` beyond it, or of the system.

    Raises:
        ValueError: bad input, naming the file, the column, the row where there is one, and the fix.
    """
    files = find_files(inputs)
    progress = progress_lines()
    with (
        new_dataset(output) as (folder, shards),
        connect(folder / ".spill", memory_limit, threads, files, spark) as engine,
    ):
        log = read(engine, files, spec, progress)
        check_values(log, spec)
        plan = make_plan(log, spec, seed)
        counts = count_splits(plan)
        lookups, buckets = fit(plan, folder)
        progress("fit vocabularies and buckets", log.count)
        schema = _schema(folder, plan, lookups, buckets, counts, {"preset": preset, "seed": seed})
        # What an addition must know of these rows; after the digest, of which it is no part.
        schema.preparation.update(staged=staged_as(plan.log, plan.spec, plan.whole), hashed=measured(lookups))
        ids = encoded(plan, lookups, buckets, progress)
        schema = engine.write(schema, ids, plan.rows([]).select(SPLIT, ORDER), counts, shards, progress)
        schema.write(folder)
        return schema


def check_values(log: Log, spec: TableSpec) -> None:
    """Refuse what no encoding covers: labels that are not 0 or 1, infinite numbers, rows without group or time.

    Raises:
        ValueError: naming the first offending row of the first offending column, and its value.
    """
    rows = log.rows(spec.used)
    checks: dict[str, tuple[BooleanValue, str]] = {}
    for name in spec.labels:
        wrong = rows[name].isnull() | ~rows[name].isin([0.0, 1.0])
        checks[name] = wrong, "a label must be 0 or 1"
    for name in spec.numeric:
        checks[name] = rows[name].isinf().fill_null(False), "a number must be finite; empty means missing"
    if spec.group_id:
        checks[spec.group_id] = rows[spec.group_id].isnull(), "the group id must not be missing"
    if spec.time_column:
        checks[spec.time_column] = rows[spec.time_column].isnull(), "the time of the split must not be missing"
    found = rows.aggregate(**{name: rows[ROW].min(where=wrong) for name, (wrong, _) in checks.items()}).to_pyarrow()
    for name, (_, rule) in checks.items():
        row = found[name][0].as_py()
        if row is not None:
            value = rows.filter(rows[ROW] == row).select(name).to_pyarrow()[name][0].as_py()
            shown = "missing" if value is None else repr(value)
            raise ValueError(f"{log.where(row)}: column {name!r} is {shown}; {rule}")


def encoded(plan: Plan, lookups: dict[str, Lookup], buckets: dict[str, LogBuckets], progress: Progress) -> Table:
    """The rows as they are stored, with ``SPLIT`` and ``ORDER``."""
    spec = plan.spec
    keyed = plan.rows(spec.used)
    if spec.group_id:
        keyed = with_group(keyed, spec.group_id, plan.whole[spec.group_id])
    encoding = partial(encode, spec=spec, lookups=lookups, buckets=buckets)
    return plan.log.engine.in_parts("encoded", keyed, encoding, progress) if spec.lists else encoding(keyed)


def _schema(
    folder: Path,
    plan: Plan,
    lookups: dict[str, Lookup],
    buckets: dict[str, LogBuckets],
    counts: dict[str, dict[str, int]],
    preparation: dict[str, Any],
) -> Schema:
    """The schema, the shards of its splits still missing."""
    spec = plan.spec
    preparation = {**preparation, **spec.model_dump(mode="json", exclude={"name"})}
    for key in ("hash_min_count", "raw_hash"):
        if preparation[key] == TableSpec.model_fields[key].get_default(call_default_factory=True):
            del preparation[key]  # so that the dataset_id is that of before there was such a key
    features = [_feature(name, folder, spec, lookups, buckets) for name in spec.features]
    digest = hashlib.sha256(json.dumps([spec.name, preparation, counts], sort_keys=True).encode())
    for feature in features:
        digest.update(feature.model_dump_json().encode())
        if isinstance(feature.encoding, LISTED):
            for column in pq.read_table(folder / feature.encoding.file).itercolumns():
                for buffer in column.combine_chunks().buffers():
                    digest.update(buffer or b"")
    return Schema(
        name=spec.name,
        dataset_id=digest.hexdigest()[:16],
        features=features,
        labels=spec.labels,
        group_id=spec.group_id,
        splits=empty_splits(counts, spec.labels),
        days=Days(names=list(plan.splits), fitted=plan.fitted) if isinstance(spec.split, DaySplit) else None,
        preparation=preparation,
    )


def empty_splits(counts: dict[str, dict[str, int]], labels: Sequence[str]) -> dict[str, Split]:
    """The splits of ``count_splits``, their shards still missing."""
    return {
        split: Split(
            num_rows=0,
            positive_rate={label: found[f"label{i}"] / found["rows"] for i, label in enumerate(labels)},
            shards=[],
        )
        for split, found in counts.items()
    }


def _feature(
    name: str, folder: Path, spec: TableSpec, lookups: dict[str, Lookup], buckets: dict[str, LogBuckets]
) -> Feature:
    if name in spec.raw_hash:
        return Feature(name=name, kind="categorical", num_embeddings=RAW_HASHES, encoding=RawHash(column=name))
    encoding = buckets[name] if name in buckets else lookups[name].encoding
    if isinstance(encoding, Vocabulary):
        size = encoding.oov_id + 1 + pq.read_metadata(folder / encoding.file).num_rows
    else:
        size = encoding.first_id + encoding.num_buckets
    if name in spec.lists:
        length = spec.lists[name].max_length
        return Feature(name=name, kind="list", num_embeddings=size, encoding=encoding, max_length=length)
    kind: Literal["numeric", "categorical"] = "numeric" if name in buckets else "categorical"
    return Feature(name=name, kind=kind, num_embeddings=size, encoding=encoding)


def progress_lines() -> Progress:
    """Rows and rates so far, to stderr."""
    started = time.perf_counter()

    def report(stage: str, rows: int) -> None:
        elapsed = time.perf_counter() - started
        print(f"{stage}: {rows:,} rows, {rows / elapsed:,.0f} rows/s, {elapsed:.1f} s", file=sys.stderr, flush=True)

    return report
