"""Parquet shards: damaged as bytes, swapped, replaced by what is no file, or rewritten with values not allowed.

The promise: refused by one line that names the shard, or read as exactly the rows that were written. Shards from before
there were checksums cannot promise that much: there the rows must be as many as the schema says, and their ids,
lengths and labels within its bounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data import shards
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from tests.conftest import reseal, write_dataset
from tests.fuzz.batches import Columns, read_splits
from tests.fuzz.harness import Target, refusal
from tests.fuzz.mutators import Rng, damage_bytes, pick, replace_by_no_file

ROWS = {"train": 90, "validation": 40, "test": 40}


@dataclass
class State:
    folder: Path
    other: Path
    """Another dataset of the same shape."""
    schema: Schema
    rows: dict[str, Columns]


def prepare(folder: Path) -> State:
    shards.ROWS_PER_SHARD = 40
    write_dataset(folder / "data", ROWS, rows_in_group=20)
    write_dataset(folder / "other", ROWS, rows_in_group=20, seed=1)
    schema = Schema.read(folder / "data")
    return State(folder / "data", folder / "other", schema, read_splits(folder / "data", schema))


def run(state: State, folder: Path, rng: Rng) -> str:
    data = shutil.copytree(state.folder, folder / "data")
    shards_there = sorted(data.glob("*/*.parquet"))
    path = pick(rng, shards_there)
    kind = pick(rng, ("bytes", "bytes", "bytes", "old bytes", "swap", "file", "rewrite", "rewrite"))
    culprit = str(path)
    if kind in ("bytes", "old bytes"):
        intact = path.read_bytes()
        # The footers of so small files are larger than their pages.
        pages = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")
        start = pick(rng, (pages, len(intact)))
        path.write_bytes(damage_bytes(rng, intact[:start]) + intact[start:])
    elif kind == "swap":
        from_other = pick(rng, (True, False, False))
        other = pick(
            rng, sorted(state.other.glob("*/*.parquet")) if from_other else [p for p in shards_there if p != path]
        )
        taken = other.read_bytes()
        if not from_other and rng.random() < 0.5:
            other.write_bytes(path.read_bytes())
            culprit = str(data)  # either of the two
        path.write_bytes(taken)
    elif kind == "file":
        replace_by_no_file(rng, path)
    else:
        rewrite(rng, path)
        reseal(data)
    if kind == "old bytes":
        without_checksums(data, state.schema)
    try:
        found = read_splits(data, Schema.read(data))
    except Exception as error:
        return refusal(error, culprit)
    assert kind not in ("swap", "file", "rewrite"), "taken"
    if kind == "old bytes":
        assert_within_bounds(found, state.schema)
        return "same" if found == state.rows else "old shard, other rows"
    assert found == state.rows, "silently other rows"
    return "same"


def without_checksums(data: Path, schema: Schema) -> None:
    """Make the schema one of the time before checksums."""
    splits = {
        name: split.model_copy(update={"shards": [s.model_copy(update={"footer": None}) for s in split.shards]})
        for name, split in schema.splits.items()
    }
    text = schema.model_copy(update={"splits": splits}).model_dump_json()
    (data / "schema.json").write_text(text)


def assert_within_bounds(found: dict[str, Columns], schema: Schema) -> None:
    for split, columns in found.items():
        for feature in schema.features:
            rows = columns[feature.name]
            assert len(rows) == ROWS[split]
            assert all(len(row) <= (feature.max_length or 1) for row in rows)
            assert all(0 <= identity < feature.num_embeddings for row in rows for identity in row)
        for label in schema.labels:
            assert len(columns[label]) == ROWS[split] and set(columns[label]) <= {0.0, 1.0}


def rewrite(rng: Rng, path: Path) -> None:
    """Write the shard again, well-formed and with one thing in it that its schema does not allow."""
    table = pq.read_table(path)
    change = pick(rng, (wrong_type, wrong_type, wrong_value, wrong_value, null, missing, doubled, other_rows))
    changed = change(rng, table)
    pq.write_table(
        changed.replace_schema_metadata(table.schema.metadata),
        path,
        row_group_size=int(rng.integers(1, 60)),
        compression=pick(rng, ("none", "zstd", "snappy", "gzip")),
        use_dictionary=bool(rng.integers(2)),
        data_page_version=pick(rng, ("1.0", "2.0")),
        write_page_checksum=bool(rng.integers(2)),
    )


def _column(rng: Rng, table: pa.Table) -> str:
    return pick(rng, table.column_names)


def _with(table: pa.Table, name: str, array: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, array)


def wrong_type(rng: Rng, table: pa.Table) -> pa.Table:
    name, rows = _column(rng, table), table.num_rows
    makers: tuple[Callable[[], pa.Array], ...] = (
        lambda: pa.array(["x"] * rows),
        lambda: pa.array([0.5] * rows),
        lambda: pa.array([1] * rows, pa.int32()),
        lambda: pa.array([1] * rows, pa.uint64()),
        lambda: pa.array([True] * rows),
        lambda: pa.array([b"\xff"] * rows),
        lambda: pa.nulls(rows),
        lambda: pa.array([[[1]]] * rows),
        lambda: pa.array([["x"]] * rows),
        lambda: pa.array([{"element": 1}] * rows),
        lambda: pa.array([[1, 2]] * rows, pa.list_(pa.int32())),
        lambda: pa.array([[1, 2]] * rows, pa.large_list(pa.int64())),
        lambda: pa.array([[1, 2]] * rows, pa.list_(pa.int64(), 2)),
        lambda: pa.array([1] * rows, pa.timestamp("us")),
        lambda: pa.array([1] * rows, pa.decimal128(20)),
        lambda: pa.array(["a"] * rows).dictionary_encode(),
        lambda: pa.array([[(1, 1)]] * rows, pa.map_(pa.int64(), pa.int64())),
    )
    return _with(table, name, pick(rng, makers)())


def wrong_value(rng: Rng, table: pa.Table) -> pa.Table:
    """An id out of range, a label that is not 0 or 1, or a list that is too long."""
    name = pick(rng, [name for name in table.column_names if name != GROUP_COLUMN])
    kind, row, values = table.schema.field(name).type, int(rng.integers(table.num_rows)), table[name].to_pylist()
    wrong: Any = pick(rng, (-1, -(2**63), 2**63 - 1, 50, 2**31, 2**32))
    if pa.types.is_list(kind):
        values[row] = pick(rng, ([wrong], [1, wrong], [1] * 5, [1] * 100_000))
    else:
        values[row] = pick(rng, (2, -1, 127, -128)) if kind == pa.int8() else wrong
    return _with(table, name, pa.array(values, kind))


def null(rng: Rng, table: pa.Table) -> pa.Table:
    name = _column(rng, table)
    kind, row, values = table.schema.field(name).type, int(rng.integers(table.num_rows)), table[name].to_pylist()
    values[row] = [None] if pa.types.is_list(kind) and rng.random() < 0.5 else None
    return _with(table, name, pa.array(values, kind))


def missing(rng: Rng, table: pa.Table) -> pa.Table:
    return table.drop_columns([_column(rng, table)])


def doubled(rng: Rng, table: pa.Table) -> pa.Table:
    name = _column(rng, table)
    return table.append_column(name, table[name])


def other_rows(rng: Rng, table: pa.Table) -> pa.Table:
    if rng.random() < 0.5:
        return table.slice(0, int(rng.integers(table.num_rows)))
    return pa.concat_tables([table, table.slice(0, 1 + int(rng.integers(table.num_rows)))])


TARGET = Target("shards", prepare, run)
