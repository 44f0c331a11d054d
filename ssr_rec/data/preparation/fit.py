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
from ibis.expr import datatypes as dt
from ibis.expr.types import Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import AdmittedHashing, Hashing, LogBuckets, Vocabulary
from ssr_rec.data.preparation.encode import (
    Lookup,
    cut_sequences,
    distinct_values,
    hash_lookup,
    log_transform,
    value_counts,
)
from ssr_rec.data.preparation.histories import number_of_time
from ssr_rec.data.preparation.row_spec import check_counts, counts_of_labels
from ssr_rec.data.preparation.sources import Log
from ssr_rec.data.preparation.spec import DaySplit, TableSpec, TimeSplit
from ssr_rec.data.preparation.split import (
    MOST_TOGETHER,
    ORDER,
    SPLIT,
    TIME,
    Numbers,
    distinct_days,
    first_rows,
    resolved,
    whole_numbers,
    with_day,
    with_order,
    with_order_of_groups,
    with_split,
    with_time,
    without_some_negatives,
)
from ssr_rec.data.schema import SPLITS

VOCABULARY_FOLDER = "vocabularies"


@dataclass(frozen=True)
class SplitPlan:
    """Holds a log and what decides where its rows go."""

    log: Log
    """Staged, then with ``ORDER``, and ``SPLIT`` where the splits are days."""
    spec: TableSpec
    whole: dict[str, Numbers]
    """Whether the group id and the time column are whole numbers."""
    splits: tuple[str, ...] = SPLITS
    """Their names; ``SPLIT`` is the index."""
    fitted: int = 1
    """Encodings are fitted on so many of the first splits."""

    def rows(self, columns: Sequence[str]) -> Table:
        """Return some columns with ``ORDER`` and ``SPLIT``; only those, since wide expressions are slow to compile."""
        spec = self.spec
        if spec.negatives < 1:
            whole = replace(self, spec=spec.model_copy(update={"negatives": 1.0}))
            label = spec.labels[0]
            rows = without_some_negatives(whole.rows([*dict.fromkeys([*columns, label])]), label, spec.negatives)
            return rows if label in columns else rows.drop(label)
        if isinstance(spec.split, DaySplit):
            return self.log.rows([*columns, ORDER, SPLIT])
        if not isinstance(spec.split, TimeSplit):
            return with_split(self.log.rows([*columns, ORDER]), spec)
        time_column = spec.split.column
        rows = self.log.rows([*dict.fromkeys([*columns, time_column]), ORDER])
        return with_split(with_time(rows, time_column, self.whole[time_column]), spec)


def plan_splits(log: Log, spec: TableSpec, seed: int) -> SplitPlan:
    """Draw the shuffle, and settle what only the data says: whether text ids are numbers, what time ratios come to."""
    times = [spec.time_column, *(history.order for history in spec.histories.values())]
    names = dict.fromkeys(name for name in (spec.group_id, spec.together, *times) if name)
    whole = {name: whole_numbers(log.rows([name]), name, name in times) for name in names}
    if isinstance(spec.split, TimeSplit):
        rows = with_time(log.rows([spec.split.column]), spec.split.column, whole[spec.split.column])
        spec = spec.model_copy(update={"split": resolved(rows, spec.split)})
    if not isinstance(spec.split, DaySplit):
        return shuffled(SplitPlan(log, spec, whole), seed)
    plan = shuffled(by_days(log, spec, spec.split, whole), seed)
    if len(plan.splits) <= plan.fitted:
        raise UserError(
            f"column {spec.split.column!r} has {len(plan.splits)} days and the encodings are fitted on {plan.fitted}: "
            "none is left to evaluate; lower --fit-days or give more days"
        )
    return plan


def shuffled(plan: SplitPlan, seed: int, first_row: int = 0) -> SplitPlan:
    """Return the plan with ``ORDER``, kept because the split of every row is asked for again with every column.

    Raises:
        UserError: too many rows for groups of them.
    """
    log, name, engine = plan.log, plan.spec.together, plan.log.engine
    if name is None:
        table = engine.with_column(log.table, ORDER, [], lambda rows: with_order(rows, seed, first_row))
        return replace(plan, log=replace(log, table=table))
    if first_row + log.count > MOST_TOGETHER:
        raise UserError(f"together: {name}: {first_row + log.count} rows are more than {MOST_TOGETHER}; leave it out")
    whole, columns = plan.whole[name], [name, *([SPLIT] if isinstance(plan.spec.split, DaySplit) else [])]
    firsts = engine.create_table("first_rows", first_rows(log.rows(columns), name, whole))

    def placed(rows: Table) -> Table:
        return with_order_of_groups(rows, firsts, name, whole, seed, first_row)

    return replace(plan, log=replace(log, table=engine.with_column(log.table, ORDER, columns, placed)))


def by_days(log: Log, spec: TableSpec, rule: DaySplit, whole: dict[str, Numbers]) -> SplitPlan:
    """Return the plan of a log whose days are splits."""
    rows = with_day(log.rows([rule.column]), rule.column, whole[rule.column])
    days = distinct_days(rows, rule.column)
    numbers = log.engine.store("days", days)

    def numbered(rows: Table) -> Table:
        dated = with_day(rows, rule.column, whole[rule.column])
        return dated.join(numbers, dated[TIME] == numbers["day"]).select(*rows.columns, **{SPLIT: numbers["index"]})

    table = log.engine.with_column(log.table, SPLIT, [rule.column], numbered)
    return SplitPlan(replace(log, table=table), spec, whole, tuple(days["name"].to_pylist()), rule.fit_days)


def count_splits(plan: SplitPlan) -> dict[str, dict[str, int]]:
    """Return per split: ``rows``, and what ``counts_of_labels`` says of the i-th label."""
    spec = plan.spec
    conditions = [column for task in spec.tasks.values() for column in task.conditions]
    rows = plan.rows([*dict.fromkeys([*spec.labels, *spec.weighted, *conditions])])
    sums = counts_of_labels(rows, spec)
    if spec.together is not None:
        sums["groups"] = (rows[ORDER] & (MOST_TOGETHER - 1) == 0).cast("int64").sum().cast("int64")
    found = rows.group_by(SPLIT).agg(rows=lambda t: t.count(), **sums).to_pyarrow().to_pylist()
    by_split = {plan.splits[line[SPLIT]]: line for line in found}
    for split in plan.splits:
        if split not in by_split:
            raise UserError(
                f"the {split} split is empty: {sum(line['rows'] for line in found)} rows, split rule "
                f"{spec.split.model_dump_json(exclude_none=True)}; change --ratios or --boundaries, or give more rows"
            )
    by_split = {split: by_split[split] for split in plan.splits}
    if plan.fitted:  # else these are days that are added to others
        check_counts(by_split, spec, isinstance(spec.split, DaySplit))
    train = by_split.get("train", {})  # days are not down-sampled
    if spec.negatives < 1 and train["label0"] == train.get("counted0", train["rows"]):
        raise UserError(f"negatives={spec.negatives}: no negative row is left to train on; keep more of them")
    return by_split


def fit(plan: SplitPlan, folder: Path) -> tuple[dict[str, Lookup], dict[str, LogBuckets]]:
    """Fit vocabularies (written under ``folder``) and bucket ranges on the training rows, or the first days, alone."""
    spec, engine = plan.spec, plan.log.engine
    # A view, so that the expression that draws the split is compiled once and not for every column.
    rows = engine.create_view("keyed", cut_sequences(plan.rows(spec.used), spec))
    train = rows.filter(rows[SPLIT] < plan.fitted)
    (folder / VOCABULARY_FOLDER).mkdir()
    groups = counted_together(rows, spec)
    counted = engine.results(
        _counted(train, key, columns, spec)
        for key, columns in groups.items()
        if spec.buckets(columns[0]) is None or spec.hash_min_count > 1
    )
    lookups: dict[str, Lookup] = {}
    for number, (key, columns) in enumerate(groups.items()):
        lookup_table = f"lookup{number}"
        buckets = spec.buckets(columns[0])
        if buckets is None or spec.hash_min_count > 1:
            encoding = _listed(key, columns[0], spec)
            entries = _write_values(next(counted), encoding, folder, spec.spread_ids)
            found = Lookup(engine.store(lookup_table, entries), encoding)
        else:
            hashing = Hashing(column=columns[0], num_buckets=buckets)
            found = hashed(plan.log, columns, hashing, lookup_table)
        for name in columns:
            own = found.encoding.model_copy(update={"column": name})
            lookups[name] = Lookup(found.table, own)
    return lookups, _ranges(plan, train)


def counted_together(rows: Table, spec: TableSpec) -> dict[str, list[str]]:
    """Return vocabulary -> its columns; a column that shares none has one of its own name.

    Raises:
        UserError: columns of different types, whose values have no common text.
    """
    groups: dict[str, list[str]] = {}
    named = {column: name for name, columns in spec.vocabularies.items() for column in columns}
    for column in spec.looked_up:
        groups.setdefault(named.get(column, column), []).append(column)
    for name, columns in groups.items():
        kinds = {}
        for column in columns:
            kind = rows[column].type()
            kinds[column] = (kind.value_type if isinstance(kind, dt.Array) else kind).copy(nullable=True)
        other = next((column for column in columns if kinds[column] != kinds[columns[0]]), None)
        if other is not None:
            raise UserError(
                f"vocabularies.{name}: column {columns[0]!r} holds {kinds[columns[0]]} and {other!r} "
                f"{kinds[other]}; convert one of them, since a value counts by its text"
            )
    return groups


def _ranges(plan: SplitPlan, train: Table) -> dict[str, LogBuckets]:
    """Return the bucket ranges of numbers, of lists of numbers and of ages, from the training rows alone."""
    spec, ranges = plan.spec, {}
    if spec.numeric:
        extremes = {f"low{i}": train[name].min() for i, name in enumerate(spec.numeric)}
        extremes |= {f"high{i}": train[name].max() for i, name in enumerate(spec.numeric)}
        found = train.aggregate(**extremes).to_pyarrow().to_pylist()[0]
        for i, name in enumerate(spec.numeric):
            low, high = (log_transform(found[f"{end}{i}"] or 0.0) for end in ("low", "high"))
            ranges[name] = LogBuckets(column=name, low=low, high=high, num_buckets=spec.num_buckets)
    for name in spec.number_lists:
        items = train.select(value=train[name].unnest())
        ranges[name] = _range(items.aggregate(low=items["value"].min(), high=items["value"].max()), name, spec)
    for name, history in spec.histories.items():
        if history.age:
            high = log_transform(_longest(plan, history.order))
            ranges[f"{name}_age"] = LogBuckets(column=f"{name}_age", low=0.0, high=high, num_buckets=spec.num_buckets)
    return ranges


def _longest(plan: SplitPlan, order: str) -> float:
    """Return the span of the training rows' times: no event is older for a row than the first is for the last.

    Raises:
        UserError: times without ages, or so far apart that an int64 does not hold these.
    """
    rows = plan.rows([order])
    rows = with_time(rows, order, plan.whole[order])
    number, unit = number_of_time(rows[TIME], order)
    rows = rows.select(SPLIT, number=number)
    number, is_train = rows["number"], rows[SPLIT] < plan.fitted
    ends = {"first": number.min(), "last": number.max()}
    ends |= {"low": number.min(where=is_train), "high": number.max(where=is_train)}
    found = rows.aggregate(**ends).to_pyarrow().to_pylist()[0]
    if not found["last"] - found["first"] < 2**63:
        raise UserError(f"time column {order!r} is from {found['first']} to {found['last']}, too far apart for ages")
    return (found["high"] - found["low"]) / unit


def _range(extremes: Table, name: str, spec: TableSpec) -> LogBuckets:
    found = extremes.to_pyarrow().to_pylist()[0]
    low, high = (log_transform(found[end] or 0.0) for end in ("low", "high"))
    return LogBuckets(column=name, low=low, high=high, num_buckets=spec.num_buckets)


def _listed(key: str, name: str, spec: TableSpec) -> Vocabulary | AdmittedHashing:
    file = f"{VOCABULARY_FOLDER}/{quote(key, safe='')}.parquet"
    buckets = spec.buckets(name)
    if buckets is None:
        return Vocabulary(column=name, min_count=spec.min_count, file=file)
    return AdmittedHashing(column=name, num_buckets=buckets, min_count=spec.hash_min_count, file=file)


def _counted(train: Table, key: str, columns: Sequence[str], spec: TableSpec) -> Table:
    """Return (value, count) of the values that a vocabulary knows, or (value, count, id) of those a hash admits."""
    encoding = _listed(key, columns[0], spec)
    counted = value_counts(train, columns, encoding.min_count)
    return hash_lookup(counted, encoding) if isinstance(encoding, AdmittedHashing) else counted


def hashed(log: Log, columns: Sequence[str], hashing: Hashing, table: str) -> Lookup:
    """Return the hashes of all values of columns, staged as ``table``."""
    hashes = hash_lookup(distinct_values(log.rows(columns), columns), hashing)
    return Lookup(log.engine.create_table(table, hashes), hashing)


def measured(lookups: dict[str, Lookup]) -> dict[str, dict[str, int]]:
    """Return of each hashed column its distinct ``values`` in the whole log, and the distinct ``ids`` they share.

    Of one that admits only frequent values, these.
    """
    found = {}
    for name, lookup in lookups.items():
        if isinstance(lookup.encoding, (Hashing, AdmittedHashing)):
            figures = lookup.table.aggregate(values=lookup.table.count(), ids=lookup.table["id"].nunique())
            found[name] = figures.to_pyarrow().to_pylist()[0]
    return found


def spread_places(count: int) -> np.ndarray:
    """Return a permutation (count,) int64 whose first entries, as any others, are spread evenly over the range.

    TorchRec cuts a table into contiguous blocks of rows, one a rank. With ids by falling frequency the first block gets
    most lookups; by multiples of the golden ratio, any number of blocks gets about as many.
    """
    multiples = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    places = np.empty(count, dtype=np.int64)
    places[np.argsort(multiples, kind="stable")] = np.arange(count)
    return places


def _write_values(
    counted: pa.Table, encoding: Vocabulary | AdmittedHashing, folder: Path, spread: bool = False
) -> pa.Table:
    """Write the values file of a column and return (value as in the column, id).

    Args:
        counted: see ``_counted``; values without ids get them by descending count.
        spread: neighbours by count get ids far apart (``spread_places``).
    """
    # Numbered here and not by a window: the values that remain fit memory, and ids do not depend on the engine.
    text = pa.table({"value": counted["value"].cast(pa.string()), "count": counted["count"].cast(pa.int64())})
    order = pc.sort_indices(text, sort_keys=[("count", "descending"), ("value", "ascending")])
    first = encoding.oov_id + 1
    places = spread_places(len(counted)) if spread else np.arange(len(counted), dtype=np.int64)
    ids = pa.array(first + places)
    if "id" in counted.column_names:
        ids = counted["id"].take(order).combine_chunks().cast(pa.int64())
    pq.write_table(text.take(order).add_column(1, "id", ids), folder / encoding.file, compression="zstd")
    return pa.table({"value": counted["value"].take(order), "id": ids.cast(pa.int32())})
