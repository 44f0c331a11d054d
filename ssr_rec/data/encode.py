"""The encodings of paper 4.1.1 as Ibis expressions: vocabulary, hash, log buckets, lists.

Nothing here is an engine's own: no UDF, no backend SQL, no window over all rows. Row arithmetic stays within int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ibis
from ibis.expr.types import Column, IntegerValue, Table

from ssr_rec.data.engine import ROW
from ssr_rec.data.split import ORDER, SPLIT, digits_of
from ssr_rec.data.table_spec import TableSpec
from ssr_rec.schema import GROUP_COLUMN, AdmittedHashing, Hashing, LogBuckets, Vocabulary

_POSITION_BITS = 40
RAW_DIGITS = 15
"""Hexadecimal digits of a raw hash."""


@dataclass(frozen=True)
class Lookup:
    """A staged table (``value``, ``id``) of the ids of a column's values; a value it lacks is out of vocabulary."""

    table: Table
    encoding: Vocabulary | Hashing | AdmittedHashing


def hash_lookup(values: Table, encoding: Hashing | AdmittedHashing) -> Table:
    """Distinct ``values`` with their ``id``, ``first_id + int(md5(text), 16) % num_buckets``.

    Only distinct values are hashed; rows look them up.
    """
    hashed = values.mutate(digest=values["value"].cast("string").hexdigest("md5"))
    remainder: IntegerValue = ibis.literal(0, "int64")
    for word in range(4):
        # Horner's rule over 32-bit words, since no engine's integer holds all 128 bits.
        remainder = (remainder * 2**32 + digits_of(hashed["digest"], 8 * word, 8)) % encoding.num_buckets
    return hashed.select(*values.columns, id=(encoding.first_id + remainder).cast("int32"))


def distinct_values(rows: Table, column: str) -> Table:
    return _values(rows, column).distinct()


def value_counts(rows: Table, column: str, min_count: int) -> Table:
    """(value, count) of the non-null values, of the items for a list, that occur at least ``min_count`` times."""
    counted = _values(rows, column).group_by("value").agg(count=lambda t: t.count())
    return counted.filter(counted["count"] >= min_count)


def _values(rows: Table, column: str) -> Table:
    # Not `Table.unnest`: that becomes a correlated join, which is some fifty times slower.
    values = rows.select(value=rows[column].unnest() if rows[column].type().is_array() else rows[column])
    return values.filter(values["value"].notnull())


def log_transform(number: float) -> float:
    """``sign(v) * ln(1 + |v|)``, the same double arithmetic as the expression in ``bucket``."""
    return math.copysign(math.log(1.0 + abs(number)), number)


def bucket(column: Column, encoding: LogBuckets) -> IntegerValue:
    """Bucket ids of a numeric column."""
    transformed = (column.abs() + 1.0).ln() * column.sign()
    # Equal extremes (a constant column, or no training value at all) leave a single bucket.
    width = (encoding.high - encoding.low) / encoding.num_buckets or 1.0
    position = ((transformed - encoding.low) / width).floor().clip(0, encoding.num_buckets - 1)
    return (position + encoding.first_id).cast("int32").fill_null(encoding.missing_id)


def encode(rows: Table, spec: TableSpec, lookups: dict[str, Lookup], buckets: dict[str, LogBuckets]) -> Table:
    """Ids, labels, group id, ``SPLIT`` and ``ORDER`` of ``rows``, which has those last three already."""
    # A column first, since the expression of an id names its digest fifteen times.
    rows = rows.mutate(**{_digest(name): rows[name].cast("string").hexdigest("md5") for name in spec.raw_hash})
    joined = rows
    for position, name in enumerate(spec.categorical):
        if name in spec.raw_hash:
            continue
        lookup = lookups[name].table.rename({f"__value{position}__": "value", f"__id{position}__": "id"})
        joined = joined.left_join(lookup, rows[name] == lookup[f"__value{position}__"])
    for position, name in enumerate(spec.lists):
        ids = list_ids(rows, name, lookups[name]).rename({f"__list_row{position}__": ROW, f"__list{position}__": "ids"})
        joined = joined.left_join(ids, rows[ROW] == ids[f"__list_row{position}__"])
    columns: dict[str, Column] = {}
    for position, name in enumerate(spec.categorical):
        if name in spec.raw_hash:
            columns[name] = (digits_of(joined[_digest(name)], 0, RAW_DIGITS) + 1).fill_null(0)
            continue
        columns[name] = _found(joined[f"__id{position}__"], joined[name], lookups[name])
    for name in spec.numeric:
        columns[name] = bucket(joined[name], buckets[name])
    for position, name in enumerate(spec.lists):
        empty = ibis.literal([], type="array<int64>")
        columns[name] = ibis.coalesce(joined[f"__list{position}__"], empty)
    for name in spec.labels:
        columns[name] = joined[name].cast("int8")
    kept = [GROUP_COLUMN] if spec.group_id else []
    return joined.select(**columns, **{name: joined[name] for name in (*kept, SPLIT, ORDER)})


def _digest(name: str) -> str:
    return f"__digest_{name}__"


def list_ids(rows: Table, column: str, lookup: Lookup) -> Table:
    """(``ROW``, ids) of the rows whose list is not empty, the items in their order."""
    array = rows[column]
    pairs = rows.select(ROW, pair=array.zip(ibis.range(array.length())).unnest())
    items = pairs.select(ROW, item=pairs["pair"]["f1"], position=pairs["pair"]["f2"])
    joined = items.left_join(lookup.table, items["item"] == lookup.table["value"])
    # Grouping forgets the order, and an ordered collect is not everywhere: the position travels in the high bits.
    identity = _found(joined["id"], joined["item"], lookup).cast("int64")
    packed = joined.select(ROW, packed=joined["position"].cast("int64") * 2**_POSITION_BITS + identity)
    grouped = packed.group_by(ROW).agg(packed=packed["packed"].collect())
    return grouped.select(ROW, ids=grouped["packed"].sort().map(lambda item: item & (2**_POSITION_BITS - 1)))


def _found(identity: Column, value: Column, lookup: Lookup) -> IntegerValue:
    encoding = lookup.encoding
    missing = ibis.literal(encoding.missing_id, "int32")
    if isinstance(encoding, Hashing):
        return identity.fill_null(missing)
    oov = ibis.literal(encoding.oov_id, "int32")
    return ibis.coalesce(identity, value.isnull().ifelse(missing, oov))
