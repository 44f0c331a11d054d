"""The protocol of paper 4.1.1 as Ibis expressions: split, vocabularies, hashing, log buckets, lists, shuffle key.

Nothing here is an engine's own: no UDF, no backend SQL, no window over all rows. Row arithmetic stays within int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ibis
from ibis.expr.types import Column, IntegerColumn, IntegerValue, StringColumn, Table

from ssr_rec.data.engine import ROW
from ssr_rec.data.table_spec import TableSpec
from ssr_rec.schema import GROUP_COLUMN, Hashing, LogBuckets, Vocabulary

SPLIT = "__split__"
"""0 train, 1 validation, 2 test."""
ORDER = "__order__"
"""Sorting by it shuffles; no two rows share it."""

_BITS = 31
_MASK = 2**_BITS - 1
# Odd multipliers with well spread bits (those of lowbias32 and murmur3, cut to 31 bits).
_MULTIPLIERS = (0x7FEB352D, 0x046CA68B, 0x05EBCA6B, 0x42B2AE35)
_POSITION_BITS = 40


@dataclass(frozen=True)
class Lookup:
    """A staged table (``value``, ``id``) of the ids of a column's values; a value it lacks is out of vocabulary."""

    table: Table
    encoding: Vocabulary | Hashing


def mix(number: IntegerValue, salt: int) -> IntegerValue:
    """A salted bijection of [0, 2**31): xor, shift and multiply, each product below 2**62."""
    number = number ^ (salt * _MULTIPLIERS[2] & _MASK)
    for position, multiplier in enumerate(_MULTIPLIERS[:3]):
        number = number ^ (number >> (16, 15, 13)[position])
        number = (number * (multiplier | 1)) & _MASK
    return number ^ (number >> 16)


def draw(row: IntegerColumn, seed: int, purpose: int) -> IntegerValue:
    """31 pseudo-random bits of a row number; rows 2**31 apart get unrelated ones."""
    salt = (seed * 0x9E3779B1 + purpose * 0x85EBCA77) & _MASK
    return mix((row & _MASK) ^ mix(row >> _BITS, salt ^ 0x2C1B3C6D), salt)


def random_split(row: IntegerColumn, ratios: list[float], seed: int) -> IntegerValue:
    """Split of a row, drawn from its number and the seed alone."""
    drawn = draw(row, seed, purpose=1)
    first, second = round(ratios[0] * 2**_BITS), round((ratios[0] + ratios[1]) * 2**_BITS)
    return ibis.cases((drawn < first, 0), (drawn < second, 1), else_=2)


def shuffle_order(row: IntegerColumn, seed: int) -> IntegerValue:
    """A 62-bit key: 31 drawn bits, then the row number's high bits, which keep rows 2**31 apart distinct."""
    return draw(row, seed, purpose=2) * 2**_BITS + (row >> _BITS)


def digits_of(digest: StringColumn, first: int, count: int) -> IntegerValue:
    """``count`` (at most 15) hexadecimal digits of a digest from position ``first`` as a number."""
    number: IntegerValue = ibis.literal(0, "int64")
    for position in range(first, first + count):
        number = number * 16 + ibis.literal("0123456789abcdef").find(digest.substr(position, 1))
    return number


def md5_remainder(text: StringColumn, modulus: int) -> IntegerValue:
    """``int(md5(text), 16) % modulus`` for a modulus below 2**31: Horner's rule over four 32-bit words."""
    digest = text.hexdigest("md5")
    remainder: IntegerValue = ibis.literal(0, "int64")
    for word in range(4):
        remainder = (remainder * 2**32 + digits_of(digest, 8 * word, 8)) % modulus
    return remainder


def hash_lookup(values: Table, encoding: Hashing) -> Table:
    """(value, id) of distinct ``values``: only distinct values are hashed, rows then look them up."""
    text = values["value"].cast("string")
    return values.select("value", id=(encoding.first_id + md5_remainder(text, encoding.num_buckets)).cast("int32"))


def distinct_values(rows: Table, column: str) -> Table:
    return _values(rows, column).distinct()


def value_counts(rows: Table, column: str, min_count: int) -> Table:
    """(value, count) of the non-null values, of the items for a list, that occur at least ``min_count`` times."""
    counted = _values(rows, column).group_by("value").agg(count=lambda t: t.count())
    return counted.filter(counted["count"] >= min_count)


def _values(rows: Table, column: str) -> Table:
    values = rows.select(value=rows[column])
    if values["value"].type().is_array():
        values = values.unnest("value")
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


def group_number(column: Column, numbers: bool) -> IntegerValue:
    """The group id: the number itself, else 60 bits of the md5 of its text."""
    if numbers:
        return column.cast("int64")
    return digits_of(column.cast("string").hexdigest("md5"), 0, 15)


def encode(rows: Table, spec: TableSpec, lookups: dict[str, Lookup], buckets: dict[str, LogBuckets]) -> Table:
    """Ids, labels, group id, ``SPLIT`` and ``ORDER`` of ``rows``, which has those last three already."""
    joined = rows
    for position, name in enumerate(spec.categorical):
        lookup = lookups[name].table.rename({f"__value{position}__": "value", f"__id{position}__": "id"})
        joined = joined.left_join(lookup, rows[name] == lookup[f"__value{position}__"])
    for position, name in enumerate(spec.lists):
        ids = list_ids(rows, name, lookups[name]).rename(
            {f"__list_row{position}__": ROW, f"__list{position}__": "ids"}
        )
        joined = joined.left_join(ids, rows[ROW] == ids[f"__list_row{position}__"])
    columns: dict[str, Column] = {}
    for position, name in enumerate(spec.categorical):
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


def list_ids(rows: Table, column: str, lookup: Lookup) -> Table:
    """(``ROW``, ids) of the rows whose list is not empty, the items in their order."""
    items = rows.select(ROW, item=rows[column]).unnest("item", offset="position")
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
