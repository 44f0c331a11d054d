"""Turn a raw click log into a prepared dataset: split, fit on the training rows, encode, shuffle, write.

The protocol is that of the SSR paper, section 4.1.1: numbers are log-transformed and cut into buckets, and values
seen at most five times in the training split share one out-of-vocabulary id. docs/data.md defines every step.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ibis
import pyarrow.parquet as pq
from ibis.expr.types import BooleanValue, Table

from ssr_rec.common import stopping
from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import canonical_json
from ssr_rec.common.saying import say
from ssr_rec.data.dense import RowVector
from ssr_rec.data.features import LISTED, RAW_HASHES, Feature, LogBuckets, RawHash, Vocabulary
from ssr_rec.data.preparation.encode import Lookup, cut_sequences, encode
from ssr_rec.data.preparation.engine import ROW, Progress
from ssr_rec.data.preparation.engines import EngineSettings, connect
from ssr_rec.data.preparation.fit import SplitPlan, count_splits, fit, measured, plan_splits
from ssr_rec.data.preparation.fit_dense import fit_dense, fit_numbers
from ssr_rec.data.preparation.fit_vectors import given_vectors, vector_feature
from ssr_rec.data.preparation.grown_columns import staged_as
from ssr_rec.data.preparation.histories import add_histories, age_units, check_histories, helpers, with_keys
from ssr_rec.data.preparation.item_weight_spec import staged_columns
from ssr_rec.data.preparation.item_weights import check_item_weights
from ssr_rec.data.preparation.row_spec import check_of_label, check_of_weight, missing_labels
from ssr_rec.data.preparation.sequence_spec import vocabulary_of
from ssr_rec.data.preparation.sources import Log, Read, find_files, read_table
from ssr_rec.data.preparation.spec import DaySplit, TableSpec
from ssr_rec.data.preparation.split import ORDER, SPLIT, with_group
from ssr_rec.data.schema import TOGETHER_COLUMN, VALUES, VALUES_KEY, Days, Schema
from ssr_rec.data.shards import new_dataset
from ssr_rec.data.splits import Split


def prepare(
    inputs: Sequence[str],
    output: Path,
    spec: TableSpec,
    *,
    read: Read = read_table,
    seed: int = 0,
    preset: str = "table",
    settings: EngineSettings | None = None,
) -> Schema:
    """Prepare the log in ``inputs`` (files, folders, globs, URLs of them) as the dataset folder ``output``.

    The result is the same for the same rows in the same order, spec and seed, whatever the number of threads or
    files and whichever the engine. ``output`` appears whole or not at all.

    Args:
        output: a path, or a ``place`` in an object store.
        seed: of the random split and of the shuffle.
        settings: of the engine; None: DuckDB on all cores.

    Raises:
        UserError: bad input, naming the file, the column, the row where there is one, and the fix.
    """
    files = find_files(inputs)
    progress = progress_lines()
    with (
        new_dataset(output) as (folder, shards),
        connect(folder / ".spill", files, settings or EngineSettings()) as engine,
    ):
        log = read(engine, files, spec, progress)
        check_values(log, spec)
        plan = plan_splits(log, spec, seed)
        counts = count_splits(plan)
        lookups, buckets = fit(plan, folder)
        lookups |= given_vectors(plan, folder)
        progress("fit vocabularies and buckets", log.count)
        schema = _schema(folder, plan, lookups, buckets, counts, {"preset": preset, "seed": seed})
        # What an addition must know of these rows; after the digest, of which it is no part.
        schema.preparation.update(staged=staged_as(plan.log, plan.spec, plan.whole), hashed=measured(lookups))
        ids = encoded(plan, lookups, buckets, progress)
        schema = engine.write(schema, ids, plan.rows([]).select(SPLIT, ORDER), counts, shards, progress)
        schema = schema.with_content_id()
        schema.write(folder)
        return schema


def check_values(log: Log, spec: TableSpec) -> None:
    """Refuse what no encoding covers: odd labels and weights, infinite numbers, rows without group or time.

    Raises:
        UserError: naming the first offending row of the first offending column, and its value.
    """
    rows = log.rows(staged_columns(spec))
    check_histories(rows, spec)
    checks: dict[str, tuple[BooleanValue, str]] = {}
    for name in spec.labels:
        checks[name] = check_of_label(rows, name, spec)
    if spec.weight is not None:
        checks[spec.weight] = check_of_weight(rows, spec.weight)
    for name in [*spec.numeric, *spec.dense]:
        checks[name] = rows[name].isinf().fill_null(False), "a number must be finite; empty means missing"
    roles = {"the group id": spec.group_id, "the id of together": spec.together}
    for role, column in {**roles, "the time of the split": spec.time_column}.items():
        if column:
            # A column may be a number or a label besides, whose check stays.
            wrong, rule = checks.get(column, (ibis.literal(False), ""))
            rule = f"{rule}; " * bool(rule) + f"{role} must not be missing"
            checks[column] = wrong | rows[column].isnull(), rule
    for name, history in spec.histories.items():
        for column in (history.by, history.order):
            wrong, rule = checks.get(column, (ibis.literal(False), ""))
            rule = f"{rule}; " * bool(rule) + f"histories of {name!r} go by it, so it must not be missing"
            if rows[column].type().is_floating():
                wrong, rule = wrong | rows[column].isinf().fill_null(False), f"{rule} or infinite"
            checks[column] = wrong | rows[column].isnull(), rule
    for name, sequence in spec.sequences.items():
        _check_aligned(log, rows, name, sequence.given)
    check_item_weights(log, rows, spec)
    for column in spec.number_lists:
        odd = rows[column].filter(lambda item: item.isinf()).length().fill_null(0) > 0
        checks[column] = odd, "a number must be finite; empty means missing"
    for column, dim in spec.row_vectors.items():
        length = rows[column].length().fill_null(0)
        odd = rows[column].filter(lambda x: x.isnull() | x.isnan() | x.isinf()).length().fill_null(0) > 0
        rule = f"a vector has {dim} finite numbers, and missing is null or an empty list"
        checks[column] = odd | ((length != 0) & (length != dim)), rule
    found = rows.aggregate(**{name: rows[ROW].min(where=wrong) for name, (wrong, _) in checks.items()}).to_pyarrow()
    for name, (_, rule) in checks.items():
        row = found[name][0].as_py()
        if row is not None:
            value = rows.filter(rows[ROW] == row).select(name).to_pyarrow()[name][0].as_py()
            shown = "missing" if value is None else repr(value)[:200]
            raise UserError(f"{log.where(row)}: column {name!r} is {shown}; {rule}")


def _check_aligned(log: Log, rows: Table, name: str, columns: Sequence[str]) -> None:
    """Refuse a row whose events have columns of different lengths.

    Raises:
        UserError: naming the first such row, the columns and their lengths.
    """
    if len(columns) < 2:
        return
    first, *others = (rows[column].length().fill_null(0) for column in columns)
    wrong = functools.reduce(operator.or_, (other != first for other in others))
    row = rows.aggregate(row=rows[ROW].min(where=wrong)).to_pyarrow()["row"][0].as_py()
    if row is not None:
        found = rows.filter(rows[ROW] == row)
        lengths = found.select(*(found[c].length().fill_null(0).name(c) for c in columns)).to_pyarrow().to_pylist()[0]
        shown = ", ".join(f"{column!r} has {length}" for column, length in lengths.items())
        raise UserError(f"{log.where(row)}: sequence {name!r}: {shown} items; the columns of an event must be aligned")


def encoded(plan: SplitPlan, lookups: dict[str, Lookup], buckets: dict[str, LogBuckets], progress: Progress) -> Table:
    """Return the rows as they are stored, with ``SPLIT`` and ``ORDER``."""
    spec = plan.spec
    keyed = with_keys(cut_sequences(plan.rows(staged_columns(spec)), spec), spec, plan.whole)
    if spec.group_id:
        keyed = with_group(keyed, spec.group_id, plan.whole[spec.group_id])
    if spec.together not in (None, spec.group_id):
        keyed = with_group(keyed, spec.together, plan.whole[spec.together], TOGETHER_COLUMN)
    encoding = partial(encode, spec=spec, lookups=lookups, buckets=buckets, kept=helpers(spec))
    engine = plan.log.engine
    ids = engine.in_parts("encoded", keyed, encoding, progress) if spec.list_columns else encoding(keyed)
    if not spec.histories:
        return ids
    ids = ids if spec.list_columns else engine.create_table("encoded", ids)
    with_histories = add_histories(engine, ids, spec, buckets, age_units(keyed, spec, plan.whole))
    progress("histories", plan.log.count)
    return with_histories


def _schema(
    folder: Path,
    plan: SplitPlan,
    lookups: dict[str, Lookup],
    buckets: dict[str, LogBuckets],
    counts: dict[str, dict[str, int]],
    preparation: dict[str, Any],
) -> Schema:
    """Return the schema, the shards of its splits still missing."""
    spec = plan.spec
    preparation = {**preparation, VALUES_KEY: VALUES, **spec.model_dump(mode="json", exclude={"name"})}
    added = ("hash_min_count", "raw_hash", "spread_ids", "vocabularies", "sequences", "negatives", "weight", "tasks")
    for key in (*added, "dense", "dense_bins", "vectors", "row_vectors", "together"):
        if preparation[key] == TableSpec.model_fields[key].get_default(call_default_factory=True):
            del preparation[key]  # so that the dataset_id is that of before there was such a key
    for task in preparation.get("tasks", {}).values():
        if task["kind"] == "binary":
            del task["kind"]
    for one in preparation.get("vectors", {}).values():
        one["file"] = Path(one["file"]).name  # where it lay says nothing of the dataset, which has a copy
    shared = vocabulary_of(spec)
    features = [
        _feature(name, folder, spec, lookups, buckets).model_copy(update={"vocabulary": shared.get(name)})
        for name in spec.features
    ]
    digest = hashlib.sha256(canonical_json([spec.name, preparation, counts]))
    for feature in features:
        digest.update(feature.model_dump_json().encode())
        if feature.vectors is not None:
            digest.update((folder / feature.vectors.file).read_bytes())
        if isinstance(feature.encoding, LISTED):
            for column in pq.read_table(folder / feature.encoding.file).itercolumns():
                for buffer in column.combine_chunks().buffers():
                    digest.update(buffer or b"")
    dense, numbers = fit_dense(plan), fit_numbers(plan)
    for one in (*dense, *numbers):
        digest.update(one.model_dump_json().encode())
    return Schema(
        name=spec.name,
        dataset_id=digest.hexdigest()[:16],
        features=features,
        sequences=[sequence.event_sequence(name) for name, sequence in spec.sequences.items()],
        dense=dense,
        row_vectors=[RowVector(name=name, dim=dim) for name, dim in spec.row_vectors.items()],
        labels=spec.labels,
        group_id=spec.group_id,
        together=spec.together,
        weight=spec.weight,
        missing_labels=missing_labels(spec),
        numbers=numbers,
        negatives=spec.negatives,
        splits=empty_splits(counts, spec.labels),
        days=Days(names=list(plan.splits), fitted=plan.fitted) if isinstance(spec.split, DaySplit) else None,
        preparation=preparation,
    )


def empty_splits(counts: dict[str, dict[str, int]], labels: Sequence[str]) -> dict[str, Split]:
    """Return the splits of ``count_splits``, their shards still missing."""
    return {
        split: Split(
            num_rows=0,
            positive_rate={
                label: found[f"label{i}"] / max(1, found.get(f"counted{i}", found["rows"]))
                for i, label in enumerate(labels)
                if f"label{i}" in found
            },
            counted={label: found[f"counted{i}"] for i, label in enumerate(labels) if f"counted{i}" in found},
            groups=found.get("groups"),
            shards=[],
        )
        for split, found in counts.items()
    }


def _feature(
    name: str, folder: Path, spec: TableSpec, lookups: dict[str, Lookup], buckets: dict[str, LogBuckets]
) -> Feature:
    if name in spec.raw_hash:
        return Feature(name=name, kind="categorical", num_embeddings=RAW_HASHES, encoding=RawHash(column=name))
    if name in spec.vectors:
        return vector_feature(name, folder, lookups[name])
    made = {feature: (one, source) for key, one in spec.sequences.items() for feature, source in one.made(key).items()}
    sequence, source = made.get(name, (None, name))
    of = source or name
    encoding = (buckets[of] if of in buckets else lookups[of].encoding).model_copy(update={"column": name})
    if isinstance(encoding, Vocabulary):
        size = encoding.oov_id + 1 + pq.read_metadata(folder / encoding.file).num_rows
    else:
        size = encoding.first_id + encoding.num_buckets
    if sequence is not None or name in spec.list_columns:
        length = sequence.max_length if sequence is not None else spec.list_columns[name].max_length
        weights = spec.lists[name].weights if name in spec.lists else None
        return Feature(
            name=name, kind="list", num_embeddings=size, encoding=encoding, max_length=length, weights=weights
        )
    kind: Literal["numeric", "categorical"] = "numeric" if name in buckets else "categorical"
    return Feature(name=name, kind=kind, num_embeddings=size, encoding=encoding)


def progress_lines() -> Progress:
    """Return what writes rows and rates so far to stderr, and stops the work where that was asked for."""
    started = time.perf_counter()

    def report(stage: str, rows: int) -> None:
        stopping.check()
        elapsed = time.perf_counter() - started
        line = f"{stage}: {rows:,} rows, {rows / elapsed:,.0f} rows/s, {elapsed:.1f} s"
        say(line, {"stage": stage, "rows": rows, "seconds": elapsed})

    return report
