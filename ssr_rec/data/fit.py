"""Fit what encodes a log on its training rows alone: boundaries, vocabularies, bucket ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis.expr.types import Table

from ssr_rec.data.encode import Lookup, distinct_values, hash_lookup, log_transform, value_counts
from ssr_rec.data.sources import Log
from ssr_rec.data.split import (
    ORDER,
    SPLIT,
    TIME,
    distinct_days,
    resolved,
    whole_numbers,
    with_day,
    with_order,
    with_split,
    with_time,
)
from ssr_rec.data.table_spec import DaySplit, TableSpec, TimeSplit
from ssr_rec.schema import SPLITS, AdmittedHashing, Hashing, LogBuckets, Vocabulary

VOCABULARY_FOLDER = "vocabularies"


@dataclass(frozen=True)
class Plan:
    """A log and what decides where its rows go."""

    log: Log
    """Staged with ``ORDER``, and ``SPLIT`` where the splits are days."""
    spec: TableSpec
    whole: dict[str, bool]
    """Whether the group id and the time column are whole numbers."""
    splits: tuple[str, ...] = SPLITS
    """Their names; ``SPLIT`` is the index."""
    fitted: int = 1
    """Encodings are fitted on so many of the first splits."""

    def rows(self, columns: Sequence[str]) -> Table:
        """Some columns with ``ORDER`` and ``SPLIT``; only those, since wide expressions are slow to compile."""
        spec = self.spec
        if isinstance(spec.split, DaySplit):
            return self.log.rows([*columns, ORDER, SPLIT])
        if not isinstance(spec.split, TimeSplit):
            return with_split(self.log.rows([*columns, ORDER]), spec)
        time_column = spec.split.column
        rows = self.log.rows([*dict.fromkeys([*columns, time_column]), ORDER])
        return with_split(with_time(rows, time_column, self.whole[time_column]), spec)


def make_plan(log: Log, spec: TableSpec, seed: int) -> Plan:
    """Draw the shuffle, and settle what only the data says: whether text ids are numbers, what time ratios come to."""
    whole = {name: whole_numbers(log.rows([name]), name) for name in (spec.group_id, spec.time_column) if name}
    if isinstance(spec.split, TimeSplit):
        rows = with_time(log.rows([spec.split.column]), spec.split.column, whole[spec.split.column])
        spec = spec.model_copy(update={"split": resolved(rows, spec.split)})
    log = shuffled(log, seed)
    if not isinstance(spec.split, DaySplit):
        return Plan(log, spec, whole)
    plan = by_days(log, spec, spec.split, whole)
    if len(plan.splits) <= plan.fitted:
        raise ValueError(
            f"column {spec.split.column!r} has {len(plan.splits)} days and the encodings are fitted on {plan.fitted}: "
            "none is left to evaluate; lower --fit-days or give more days"
        )
    return plan


def shuffled(log: Log, seed: int, first_row: int = 0) -> Log:
    """The log with ``ORDER``, kept because the split of every row is asked for again with every column."""
    table = log.engine.with_column(log.table, ORDER, [], lambda rows: with_order(rows, seed, first_row))
    return replace(log, table=table)


def by_days(log: Log, spec: TableSpec, rule: DaySplit, whole: dict[str, bool]) -> Plan:
    """The plan of a shuffled log whose days are splits."""
    rows = with_day(log.rows([rule.column]), rule.column, whole[rule.column])
    days = distinct_days(rows, rule.column)
    numbers = log.engine.store("days", days)

    def numbered(rows: Table) -> Table:
        dated = with_day(rows, rule.column, whole[rule.column])
        return dated.join(numbers, dated[TIME] == numbers["day"]).select(*rows.columns, **{SPLIT: numbers["index"]})

    table = log.engine.with_column(log.table, SPLIT, [rule.column], numbered)
    return Plan(replace(log, table=table), spec, whole, tuple(days["name"].to_pylist()), rule.fit_days)


def count_splits(plan: Plan) -> dict[str, dict[str, int]]:
    """Per split: ``rows``, and the positives of the i-th label as ``label<i>``."""
    spec, rows = plan.spec, plan.rows(plan.spec.labels)
    sums = {f"label{i}": rows[label].sum().cast("int64") for i, label in enumerate(spec.labels)}
    found = rows.group_by(SPLIT).agg(rows=lambda t: t.count(), **sums).to_pyarrow().to_pylist()
    by_split = {plan.splits[line[SPLIT]]: line for line in found}
    for split in plan.splits:
        if split not in by_split:
            raise ValueError(
                f"the {split} split is empty: {sum(line['rows'] for line in found)} rows, split rule "
                f"{spec.split.model_dump_json(exclude_none=True)}; change --ratios or --boundaries, or give more rows"
            )
    return {split: by_split[split] for split in plan.splits}


def fit(plan: Plan, folder: Path) -> tuple[dict[str, Lookup], dict[str, LogBuckets]]:
    """Fit vocabularies (written under ``folder``) and bucket ranges on the training rows, or the first days, alone."""
    spec, engine = plan.spec, plan.log.engine
    # A view, so that the expression that draws the split is compiled once and not for every column.
    rows = engine.create_view("keyed", plan.rows(spec.used))
    train = rows.filter(rows[SPLIT] < plan.fitted)
    (folder / VOCABULARY_FOLDER).mkdir()
    names = spec.looked_up
    counted = engine.results(
        _counted(train, name, spec) for name in names if spec.buckets(name) is None or spec.hash_min_count > 1
    )
    lookups: dict[str, Lookup] = {}
    for number, name in enumerate(names):
        lookup_table = f"lookup{number}"
        buckets = spec.buckets(name)
        if buckets is None or spec.hash_min_count > 1:
            encoding = _listed(name, spec)
            entries = _write_values(next(counted), encoding, folder)
            lookups[name] = Lookup(engine.store(lookup_table, entries), encoding)
        else:
            hashing = Hashing(column=name, num_buckets=buckets)
            lookups[name] = hashed(plan.log, name, hashing, lookup_table)
    ranges = {}
    if spec.numeric:
        extremes = {f"low{i}": train[name].min() for i, name in enumerate(spec.numeric)}
        extremes |= {f"high{i}": train[name].max() for i, name in enumerate(spec.numeric)}
        found = train.aggregate(**extremes).to_pyarrow().to_pylist()[0]
        for i, name in enumerate(spec.numeric):
            low, high = (log_transform(found[f"{end}{i}"] or 0.0) for end in ("low", "high"))
            ranges[name] = LogBuckets(column=name, low=low, high=high, num_buckets=spec.num_buckets)
    return lookups, ranges


def _listed(name: str, spec: TableSpec) -> Vocabulary | AdmittedHashing:
    file = f"{VOCABULARY_FOLDER}/{quote(name, safe='')}.parquet"
    buckets = spec.buckets(name)
    if buckets is None:
        return Vocabulary(column=name, min_count=spec.min_count, file=file)
    return AdmittedHashing(column=name, num_buckets=buckets, min_count=spec.hash_min_count, file=file)


def _counted(train: Table, name: str, spec: TableSpec) -> Table:
    """(value, count) of the values that a vocabulary knows, or (value, count, id) of those a hash admits."""
    encoding = _listed(name, spec)
    counted = value_counts(train, name, encoding.min_count)
    return hash_lookup(counted, encoding) if isinstance(encoding, AdmittedHashing) else counted


def hashed(log: Log, name: str, hashing: Hashing, table: str) -> Lookup:
    """The hashes of all values of a column, staged as ``table``."""
    hashes = hash_lookup(distinct_values(log.rows([name]), name), hashing)
    return Lookup(log.engine.create_table(table, hashes), hashing)


def measured(lookups: dict[str, Lookup]) -> dict[str, dict[str, int]]:
    """Of each hashed column: its distinct ``values`` in the whole log, and the distinct ``ids`` they share.

    Of one that admits only frequent values, these.
    """
    found = {}
    for name, lookup in lookups.items():
        if isinstance(lookup.encoding, (Hashing, AdmittedHashing)):
            figures = lookup.table.aggregate(values=lookup.table.count(), ids=lookup.table["id"].nunique())
            found[name] = figures.to_pyarrow().to_pylist()[0]
    return found


def _write_values(counted: pa.Table, encoding: Vocabulary | AdmittedHashing, folder: Path) -> pa.Table:
    """Write the values file of a column and return (value as in the column, id).

    Args:
        counted: see ``_counted``; values without ids get them by descending count.
    """
    # Numbered here and not by a window: the values that remain fit memory, and ids do not depend on the engine.
    text = pa.table({"value": counted["value"].cast(pa.string()), "count": counted["count"].cast(pa.int64())})
    order = pc.sort_indices(text, sort_keys=[("count", "descending"), ("value", "ascending")])
    first = encoding.oov_id + 1
    ids = pa.array(np.arange(first, first + len(counted), dtype=np.int64))
    if "id" in counted.column_names:
        ids = counted["id"].take(order).combine_chunks().cast(pa.int64())
    pq.write_table(text.take(order).add_column(1, "id", ids), folder / encoding.file, compression="zstd")
    return pa.table({"value": counted["value"].take(order), "id": ids.cast(pa.int32())})
