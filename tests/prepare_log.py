"""A small raw log, its spec, and a prepared dataset read back, for the tests of the preparation."""

from __future__ import annotations

import gzip
import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import TableSpec, make_spec
from ssr_rec.data.schema import DATASET_ID_KEY, Schema

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

Row = dict[str, Any]


def make_rows(count: int = 3000, seed: int = 1) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        rows.append(
            {
                "click": int(draw.random() < 0.3),
                "user": draw.randrange(200),
                "city": draw.choice([None, "Ulm", "Köln", "a,b", *(f"c{draw.randrange(900)}" for _ in range(3))]),
                "price": draw.choice([None, -3.5, 0.0, draw.expovariate(0.01)]),
                "day": f"2024-01-{1 + number * 20 // count:02d}",
                "tags": draw.choice([None, [], [draw.randrange(40) for _ in range(draw.randrange(1, 8))]]),
                "uid": number,
            }
        )
    return rows


SPEC: dict[str, Any] = {
    "name": "toy",
    "labels": ["click"],
    "categorical": ["user", "city", "uid"],
    "numeric": ["price"],
    "lists": {"tags": {"max_length": 4, "separator": "|"}},
    "group_id": "user",
    "ignore": ["day"],
    "min_count": 3,
    "num_buckets": 16,
}
# `uid` as a feature with a vocabulary of every training value would hide a row's identity: hash it wide instead.
SPEC["hash_buckets"] = {"uid": 2**30}


def spec_with(**changes: Any) -> TableSpec:
    return make_spec({**SPEC, **changes}, "test")


def write_parquet(rows: list[Row], path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_csv(rows: list[Row], path: Path) -> Path:
    def cell(value: Any) -> str:
        text = "" if value is None else "|".join(map(str, value)) if isinstance(value, list) else str(value)
        return f'"{text}"' if "," in text else text

    lines = [",".join(rows[0])] + [",".join(cell(value) for value in row.values()) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_split(folder: Path, schema: Schema, split: str) -> list[Row]:
    shards = [pq.ParquetFile(folder / shard.path) for shard in schema.splits[split].shards]
    for shard in shards:
        assert shard.schema_arrow.metadata[DATASET_ID_KEY].decode() in schema.shard_ids
    return [row for shard in shards for row in shard.read().to_pylist()]


def run(tmp_path: Path, inputs: list[Path], spec: TableSpec, name: str = "out", **options: Any) -> tuple[Schema, Any]:
    folder = tmp_path / name
    schema = prepare([str(path) for path in inputs], folder, spec, **options)
    assert Schema.read(folder) == schema
    return schema, {split: read_split(folder, schema, split) for split in schema.splits}


def md5_id(value: Any, buckets: int) -> int:
    return 1 + int(hashlib.md5(str(value).encode()).hexdigest(), 16) % buckets
