"""Makes the encodings of paper 4.1.1 as Ibis expressions: vocabulary, hash, log buckets, lists.

Nothing here is an engine's own: no UDF, no backend SQL, no window over all rows. Row arithmetic stays within int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ibis
from ibis.expr.types import ArrayValue, Column, IntegerValue, Table

from ssr_rec.data.features import AdmittedHashing, Hashing, LogBuckets, Vocabulary
from ssr_rec.data.item_weights import stored_weights
from ssr_rec.data.preparation.column_types import cut_list
from ssr_rec.data.preparation.engine import ROW
from ssr_rec.data.preparation.item_weight_spec import staged_weights
from ssr_rec.data.preparation.row_spec import encoded_label
from ssr_rec.data.preparation.spec import TableSpec
from ssr_rec.data.preparation.split import ORDER, SPLIT, digits_of
from ssr_rec.data.schema import GROUP_COLUMN, TOGETHER_COLUMN, WEIGHT_COLUMN

POSITION_BITS = 40
RAW_DIGITS = 15
"""Hexadecimal digits of a raw hash."""


@dataclass(frozen=True)
class Lookup:
    """Holds a staged table (``value``, ``id``) of a column's ids; a value it lacks is out of vocabulary."""

    table: Table
    encoding: Vocabulary | Hashing | AdmittedHashing


def hash_lookup(values: Table, encoding: Hashing | AdmittedHashing) -> Table:
    """Return distinct ``values`` with their ``id``, ``first_id + int(md5(text), 16) % num_buckets``.

    Only distinct values are hashed; rows look them up.
    """
    hashed = values.mutate(digest=values["value"].cast("string").hexdigest("md5"))
    remainder: IntegerValue = ibis.literal(0, "int64")
    for word in range(4):
        # Horner's rule over 32-bit words, since no engine's integer holds all 128 bits.
        remainder = (remainder * 2**32 + digits_of(hashed["digest"], 8 * word, 8)) % encoding.num_buckets
    return hashed.select(*values.columns, id=(encoding.first_id + remainder).cast("int32"))


def distinct_values(rows: Table, columns: Sequence[str]) -> Table:
    """Return (value) of the non-null values of columns of one type, or of the items of lists, each once."""
    return _values(rows, columns).distinct()


def value_counts(rows: Table, columns: Sequence[str], min_count: int) -> Table:
    """Return (value, count) of the non-null values, of the items for a list, that occur at least ``min_count`` times.

    Args:
        columns: counted together, of one type.
    """
    counted = _values(rows, columns).group_by("value").agg(count=lambda t: t.count())
    return counted.filter(counted["count"] >= min_count)


def _values(rows: Table, columns: Sequence[str]) -> Table:
    # Not `Table.unnest`: that becomes a correlated join, which is some fifty times slower.
    each = [rows.select(value=c.unnest() if c.type().is_array() else c) for c in (rows[name] for name in columns)]
    values = ibis.union(*each) if len(each) > 1 else each[0]
    return values.filter(values["value"].notnull())


def log_transform(number: float) -> float:
    """Return ``sign(v) * ln(1 + |v|)``, the same double arithmetic as the expression in ``bucket``."""
    return math.copysign(math.log(1.0 + abs(number)), number)


def transformed(number: Column) -> Column:
    """Return ``log_transform`` of a numeric column, or of an item."""
    return (number.abs() + 1.0).ln() * number.sign()


def bucket(column: Column, encoding: LogBuckets) -> IntegerValue:
    """Return bucket ids of a numeric column."""
    if _is_one(encoding):
        return _only_bucket(column, encoding)
    return _clipped(_position(transformed(column), encoding), encoding)


def bucket_items(numbers: ArrayValue, encoding: LogBuckets) -> ArrayValue:
    """Return bucket ids (int64) of the items of lists of float64, none of which is null."""
    if _is_one(encoding):
        return numbers.map(lambda number: _only_bucket(number, encoding).cast("int64"))
    # Step by step: engines compute a part of a function of items as often as its text has it.
    positions = numbers.map(transformed).map(lambda number: _position(number, encoding))
    return positions.map(lambda position: _clipped(position, encoding).cast("int64"))


def _is_one(encoding: LogBuckets) -> bool:
    """Return whether one bucket was trained: a constant column, or no training value at all."""
    return encoding.high <= encoding.low


def _only_bucket(number: Column, encoding: LogBuckets) -> IntegerValue:
    one = ibis.literal(encoding.first_id, "int32")
    return number.notnull().ifelse(one, ibis.literal(encoding.missing_id, "int32"))


def _position(number: Column, encoding: LogBuckets) -> IntegerValue:
    width = (encoding.high - encoding.low) / encoding.num_buckets
    return ((number - encoding.low) / width).floor()


def _clipped(position: Column, encoding: LogBuckets) -> IntegerValue:
    kept = position.clip(0, encoding.num_buckets - 1)
    return (kept + encoding.first_id).cast("int32").fill_null(encoding.missing_id)


def cut_sequences(rows: Table, spec: TableSpec) -> Table:
    """Return ``rows`` with the items kept of lists of which all are staged, to see that they are aligned.

    That are the events of sequences, and items with weights.
    """
    weights = staged_weights(spec)
    whole = {name: one for name, one in spec.list_columns.items() if name not in spec.lists or name in weights}
    whole |= {weights[name]: spec.lists[name] for name in weights if weights[name] in rows.columns}
    cut = {name: cut_list(rows[name], one) for name, one in whole.items()}
    return rows.mutate(**cut) if cut else rows


def encode(
    rows: Table,
    spec: TableSpec,
    lookups: dict[str, Lookup],
    buckets: dict[str, LogBuckets],
    kept: Sequence[str] = (),
) -> Table:
    """Return ids, labels, group id, ``SPLIT``, ``ORDER`` and the ``kept`` of ``rows``, which has the last four."""
    joined = rows
    singles = {name: name for name in spec.categorical} | {name: given.of for name, given in spec.vectors.items()}
    for position, (name, source) in enumerate(singles.items()):
        if name in spec.raw_hash:
            continue
        lookup = lookups[name].table.rename({f"__value{position}__": "value", f"__id{position}__": "id"})
        joined = joined.left_join(lookup, rows[source] == lookup[f"__value{position}__"])
    numbers = spec.number_lists
    looked_up = [name for name in spec.list_columns if name not in numbers]
    for position, name in enumerate(looked_up):
        ids = list_ids(rows, name, lookups[name]).rename({f"__list_row{position}__": ROW, f"__list{position}__": "ids"})
        joined = joined.left_join(ids, rows[ROW] == ids[f"__list_row{position}__"])
    columns: dict[str, Column] = {}
    for position, (name, source) in enumerate(singles.items()):
        if name in spec.raw_hash:
            digest = joined[name].cast("string").hexdigest("md5")
            columns[name] = (digits_of(digest, 0, RAW_DIGITS) + 1).fill_null(0)
            continue
        columns[name] = _found(joined[f"__id{position}__"], joined[source], lookups[name])
    for name in spec.numeric:
        columns[name] = bucket(joined[name], buckets[name])
    empty = ibis.literal([], type="array<int64>")
    for position, name in enumerate(looked_up):
        columns[name] = ibis.coalesce(joined[f"__list{position}__"], empty)
    for name in numbers:
        items = ibis.coalesce(joined[name], ibis.literal([], type="array<float64>"))
        columns[name] = bucket_items(items, buckets[name])
    columns = {name: columns[name] for name in spec.features if name in columns}
    none = ibis.literal([], type="array<float64>")
    for name, weights in staged_weights(spec).items():
        columns[stored_weights(name)] = ibis.coalesce(joined[weights], none).cast("array<float32>")
    columns |= {name: joined[name] for name in spec.dense}
    columns |= {name: ibis.coalesce(joined[name], none) for name in spec.row_vectors}
    for name in spec.labels:
        columns[name] = encoded_label(joined, name, spec)
    if spec.weight is not None:
        columns[WEIGHT_COLUMN] = joined[spec.weight].cast("float32")
    group = [GROUP_COLUMN] if spec.group_id else []
    group += [TOGETHER_COLUMN] if spec.together not in (None, spec.group_id) else []
    return joined.select(**columns, **{name: joined[name] for name in (*group, SPLIT, ORDER, *kept)})


def list_ids(rows: Table, column: str, lookup: Lookup) -> Table:
    """Return (``ROW``, ids) of the rows whose list is not empty, the items in their order."""
    pairs = rows.select(ROW, pair=rows[column].zip(ibis.range(rows[column].length())).unnest())
    items = pairs.select(ROW, item=pairs["pair"]["f1"], position=pairs["pair"]["f2"])
    joined = items.left_join(lookup.table, items["item"] == lookup.table["value"])
    identity = _found(joined["id"], joined["item"], lookup).cast("int64")
    # Grouping forgets the order, and an ordered collect is not everywhere: the position travels in the high bits.
    packed = joined.select(ROW, packed=joined["position"].cast("int64") * 2**POSITION_BITS + identity)
    grouped = packed.group_by(ROW).agg(packed=packed["packed"].collect())
    return grouped.select(ROW, ids=grouped["packed"].sort().map(lambda item: item & (2**POSITION_BITS - 1)))


def _found(identity: Column, value: Column, lookup: Lookup) -> IntegerValue:
    encoding = lookup.encoding
    missing = ibis.literal(encoding.missing_id, "int32")
    if isinstance(encoding, Hashing):
        return identity.fill_null(missing)
    oov = ibis.literal(encoding.oov_id, "int32")
    return ibis.coalesce(identity, value.isnull().ifelse(missing, oov))
