"""Random logs, prepared from four containers by both engines and scored in three ways, against a plain reading.

    python -m tests.fuzz.logs --logs 1000 --seed 0 --spark-every 50

Every log has columns of random kinds, and lies in one to three files given in a random order. It is prepared as CSV, as
gzipped TSV, as typed parquet and as parquet that pandas wrote; each dataset must hold the rows of
``log_reference.Reference``, in order. Its rows are then encoded as mappings, as a DataFrame and as the files that
``score.py`` reads: ids decide logits, so equal ids are equal scores. A log with a difference is printed with its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gzip
import io
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.preparation.engines import EngineSettings, SparkSettings
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.score_file import _pieces
from tests.fuzz.log_reference import Reference, Row, text_of

WORDS = [
    "",
    "a",
    "b c",
    " a",
    "007",
    "7",
    "7.0",
    "True",
    "FALSE",
    "none",
    "NaN",
    "null",
    'a "q"',
    "x\ny",
    "Ü",
    "日本",
    ",",
]
WORDS += ["\t", "'", "-3.00", "1e5", "-", "0", "false", "a,b", "é", "\\", "=1"]
ITEMS = ["a", "7", "7.0", "True", "true", "", "Ü", "b c", "007"]
CONTAINERS = ("csv", "tsv.gz", "parquet", "pandas.parquet")


def draw(seed: int) -> tuple[dict[str, Any], list[Row], dict[str, pa.DataType], list[int]]:
    """Return a spec, rows, the parquet type of each column, and how many rows each file has."""
    r = random.Random(seed)
    count = r.randrange(60, 200)
    gaps = r.choice([0.0, 0.2])

    def missing(value: Any) -> Any:
        return None if r.random() < gaps else value

    day = datetime.date(2024, 1, 1)
    kinds: dict[str, tuple[pa.DataType, Any]] = {
        "small": (pa.int64(), lambda: missing(r.randrange(-3, 9))),
        "large": (pa.int64(), lambda: r.choice([2**53 + 1, -(2**60), 2**62, 5])),
        "unsigned": (pa.uint64(), lambda: r.choice([0, 7, 2**63 + 5, 2**64 - 1])),
        "flag": (pa.bool_(), lambda: missing(r.random() < 0.5)),
        "word": (pa.string(), lambda: missing(r.choice(WORDS))),
        "date": (pa.date32(), lambda: missing(day + datetime.timedelta(r.randrange(5)))),
        "narrow": (pa.int16(), lambda: r.randrange(0, 30)),
    }
    columns: dict[str, tuple[pa.DataType, Any]] = {}
    for number in range(r.randrange(1, 5)):
        kind = r.choice(list(kinds))
        columns[f"c{number}_{kind}"] = kinds[kind]
    categorical = list(columns)
    numeric = [f"n{number}" for number in range(r.randrange(0, 3))]
    for name in numeric:
        integers, scale = r.random() < 0.3, 10 ** r.randrange(0, 6)
        constant = r.random() < 0.1
        columns[name] = (
            (pa.int64(), lambda s=scale: missing(r.randrange(-s, s + 1)))
            if integers
            else (pa.float64(), lambda s=scale, c=constant: missing(1.5 if c else r.gauss(0, s)))
        )
    lists: dict[str, Any] = {}
    for number in range(r.randrange(0, 3)):
        whole, name = r.random() < 0.4, f"l{number}"
        lists[name] = {"max_length": r.randrange(1, 5), "separator": "|", "keep": r.choice(["first", "last"])}

        def items(whole: bool = whole) -> Any:
            if r.random() < 0.2:
                return r.choice([None, []])
            found = [r.randrange(9) if whole else r.choice(ITEMS) for _ in range(r.randrange(1, 6))]
            return found if found != [""] else ["a"]  # as text, that is an empty list

        columns[name] = (pa.list_(pa.int64() if whole else pa.string()), items)
    group = r.choice(["whole", "word"])
    columns["g"] = (pa.int64(), lambda: r.randrange(9)) if group == "whole" else (pa.string(), lambda: r.choice("abc7"))
    columns["t"] = (pa.int64(), lambda: r.choice([1, 2, 10, 99, 10**18 + r.randrange(9)]))
    columns["click"] = (pa.int64(), lambda: int(r.random() < 0.4))
    rows = [{name: make() for name, (_, make) in columns.items()} for _ in range(count)]
    hashed = {name: r.randrange(2, 40) for name in (*categorical, *lists) if r.random() < 0.25}
    split: dict[str, Any] = {"type": "random", "ratios": [6, 2, 2]}
    if r.random() < 0.4:
        split = {"type": "time", "column": "t", "boundaries": [10, 10**17]}
    spec = {
        "name": "log",
        "labels": ["click"],
        "categorical": categorical,
        "numeric": numeric,
        "lists": lists,
        "group_id": "g",
        "split": split,
        "min_count": r.randrange(1, 4),
        "num_buckets": r.randrange(1, 20),
        "hash_buckets": hashed,
        "ignore": [] if split["type"] == "time" else ["t"],
    }
    cuts = sorted(r.randrange(0, count) for _ in range(r.randrange(0, 3)))
    sizes = np.diff([0, *cuts, count]).tolist()
    found = {name: kind for name, (kind, _) in columns.items()}
    found |= draw_sequences(r, spec, rows)
    found |= draw_numbers(r, spec, rows)
    found |= draw_weighted_list(r, spec, rows)
    return spec, rows, found, [size for size in sizes if size]


def draw_sequences(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log a sequence of lists, a vocabulary shared with a column, a history of its own, or none of these."""
    kinds: dict[str, pa.DataType] = {}
    sequences: dict[str, Any] = {}
    if r.random() < 0.4:
        sequences["given"] = {"columns": ["s0", "s1"], "numeric": ["sn"], "max_length": r.randrange(1, 5)}
        sequences["given"]["separator"] = "|"
        if r.random() < 0.5:
            sequences["given"]["age"] = sequences["given"]["numeric"].pop()
        kinds |= {"s0": pa.list_(pa.int64()), "s1": pa.list_(pa.string()), "sn": pa.list_(pa.float64())}
        for row in rows:
            length = r.randrange(0, 6)
            row["s0"] = [r.randrange(9) for _ in range(length)]
            row["s1"] = [r.choice(ITEMS[:5]) for _ in range(length)]
            row["sn"] = [round(abs(r.gauss(0, 50)), 2) for _ in range(length)]
        if r.random() < 0.6:
            kinds["sc"] = pa.int64()
            spec["categorical"] = [*spec["categorical"], "sc"]
            spec["vocabularies"] = {"shared": ["s0", "sc"]}
            for row in rows:
                row["sc"] = r.randrange(3, 12)
    if r.random() < 0.4:
        named = [*spec["categorical"], *spec["numeric"]]
        columns = r.sample(named, min(len(named), r.randrange(1, 3)))
        where = {"where": "click = 1"} if r.random() < 0.5 else {}
        from_log = {"by": "g", "order": "t", "columns": columns, "age": r.random() < 0.5, **where}
        sequences["made"] = {"from_log": from_log, "max_length": r.randrange(1, 5)}
        moments = r.randrange(2, 60)
        for row in rows if spec["split"]["type"] == "random" else ():
            row["t"] = r.randrange(moments)
    if sequences:
        spec["sequences"] = sequences
    return kinds


def draw_numbers(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log row weights, a task of some rows, dense columns and given vectors, or none of these."""
    kinds: dict[str, pa.DataType] = {}

    def column(name: str, kind: pa.DataType, make: Any) -> None:
        kinds[name] = kind
        for row in rows:
            row[name] = make()

    if r.random() < 0.4:
        spec["weight"] = "w"
        column("w", pa.float64(), lambda: r.choice([0.0, 1.0, 1.0, 0.1, 2.25, 1e-3]))
    if r.random() < 0.5:
        spec["labels"] = ["click", "pay"]
        conditions = ["click = 1", *(f"{name} > 0" for name in spec["numeric"])]
        task = {"missing": True} if r.random() < 0.6 else {"where": r.choice(conditions)}
        spec["tasks"] = {"pay": task | ({"where": r.choice(conditions)} if r.random() < 0.3 else {})}
        column("pay", pa.int64(), lambda: r.choice([0, 1, None]) if "missing" in task else r.randrange(2))
    if r.random() < 0.5:
        spec["dense"] = {name: r.choice(["standard", "log"]) for name in ("d0", "d1")[: r.randrange(1, 3)]}
        for name in spec["dense"]:
            scale, gaps = 10.0 ** r.randrange(-3, 7), r.choice([0.0, 0.3, 1.0])
            column(name, pa.float64(), lambda s=scale, g=gaps: None if r.random() < g else r.gauss(0, s))
    sources = [name for name in spec["categorical"] if not name.endswith(("word", "unsigned"))]
    if sources and r.random() < 0.5:
        of = r.choice(sources)
        texts = sorted({text for row in rows if (text := text_of(row[of])) is not None})
        values = r.sample(texts, r.randrange(1, len(texts) + 1)) if texts else []
        if values:
            spec["vectors"] = {"v": {"of": of, "file": "", "without": "zero", "values": values}}
    if r.random() < 0.3:
        size = r.randrange(1, 4)
        spec["row_vectors"] = {"rv": size}
        one = lambda: [r.gauss(0, 1) for _ in range(size)]  # noqa: E731
        column("rv", pa.list_(pa.float64()), lambda: one() if r.random() < 0.8 else r.choice([None, []]))
    return kinds


def draw_weighted_list(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log a list whose items have weights, in a column of their own or in the items, or none."""
    if r.random() < 0.5:
        return {}
    in_items = r.random() < 0.5
    settings = {"max_length": r.randrange(1, 5), "separator": "|", "keep": r.choice(["first", "last"])}
    spec["lists"] = {**spec["lists"], "lw": {**settings, "weights": ":" if in_items else "ww"}}
    if r.random() < 0.3:
        spec["hash_buckets"] = {**spec["hash_buckets"], "lw": r.randrange(2, 40)}
    for row in rows:
        items = [r.choice(["a", "b:c", "7.0", "True", "Ü", ""]) for _ in range(r.randrange(0, 6))]
        weights = [r.choice([0.0, 1.0, 0.1, 1e-3, 33.25, r.random()]) for _ in items]
        if in_items:
            row["lw"] = [f"{item}:{weight}" for item, weight in zip(items, weights, strict=True)]
        else:
            items = ["a", *items[1:]] if items == [""] else items  # as text, that is an empty list
            row["lw"], row["ww"] = items, weights
    kinds = {"lw": pa.list_(pa.string())}
    return kinds if in_items else {**kinds, "ww": pa.list_(pa.float64())}


def write_vectors(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the spec as the preparation takes it, its vectors written to files."""
    if "vectors" not in spec:
        return spec
    given = dict(spec["vectors"]["v"])
    values = given.pop("values")
    given["file"] = str(folder / "v.parquet")
    table = {given["of"]: values, "vector": [[float(number), -1.0] for number in range(len(values))]}
    pq.write_table(pa.table(table), given["file"])
    return {**spec, "vectors": {"v": given}}


def write(rows: Sequence[Row], kinds: dict[str, pa.DataType], container: str, path: Path) -> Path:
    """Write rows to a file of that kind of container."""
    path = path.with_name(f"{path.name}.{container.removeprefix('pandas.')}")
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(list(kinds.items()))), path)
    elif container == "pandas.parquet":
        frame(rows, kinds).to_parquet(path)
    else:
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t" if container.startswith("tsv") else ",", lineterminator="\n")
        writer.writerow(kinds)
        writer.writerows([[cell(row[name]) for name in kinds] for row in rows])
        data = out.getvalue().encode()
        path.write_bytes(gzip.compress(data) if container.endswith(".gz") else data)
    return path


def cell(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(cell, value))
    return "" if value is None else value.isoformat() if isinstance(value, datetime.date) else str(value)


def frame(rows: Sequence[Row], kinds: dict[str, pa.DataType]) -> pd.DataFrame:
    """Return the rows as pandas has them: whole numbers with gaps are floats."""
    made = {}
    for name, kind in kinds.items():
        values = [row[name] for row in rows]
        unsigned = pa.types.is_uint64(kind)
        made[name] = pd.Series(values, dtype="uint64" if unsigned else None) if rows else pd.Series([], dtype=object)
    return pd.DataFrame(made)


def check(seed: int, work: Path, with_spark: bool) -> str | None:
    """Return what differs for one log, None if nothing does."""
    spec, rows, kinds, sizes = draw(seed)
    r = random.Random(seed + 1)
    parts, start = [], 0
    for size in sizes:
        parts.append(rows[start : start + size])
        start += size
    for container in CONTAINERS if "rv" not in kinds else CONTAINERS[2:]:  # text has no form for vectors
        order = r.sample(range(len(parts)), len(parts))  # another order of the files for each container
        in_order = [row for place in order for row in parts[place]]
        wanted = Reference(in_order, spec, seed)
        folder = work / container
        folder.mkdir(parents=True)
        files = [write(parts[place], kinds, container, folder / f"part{place}") for place in order]
        engines: list[SparkSettings | None] = [None, SparkSettings()] if with_spark else [None]
        for engine in engines:
            output = folder / f"out_{engine is not None}"
            where = f"{container}, files {order}, {'Spark' if engine else 'DuckDB'}"
            try:
                schema = prepare(
                    [str(path) for path in files],
                    output,
                    make_spec(write_vectors(spec, folder), "fuzz"),
                    seed=seed,
                    settings=EngineSettings(spark=engine),
                )
            except ValueError as error:
                uncounted = " counts (" in str(error) and not all(map(wanted.counts, wanted.splits))
                if not uncounted and (all(wanted.splits.values()) or "split is empty" not in str(error)):
                    return f"{where}: refused: {error}"
                continue
            for split, expected in wanted.splits.items():
                shards = [pq.read_table(output / shard.path).to_pylist() for shard in schema.splits[split].shards]
                found = [row for shard in shards for row in shard]
                for number, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
                    if mine != theirs:
                        different = {key: (mine[key], theirs[key]) for key in theirs if mine.get(key) != theirs[key]}
                        return f"{where}: {split} row {number}: {different}"
                if len(found) != len(expected):
                    return f"{where}: {split} has {len(found)} rows, not {len(expected)}"
            if engine is None and (problem := scoring_problem(schema, output, kinds, files, wanted)):
                return f"{where}: {problem}"
    return None


def scoring_problem(
    schema: Schema, folder: Path, kinds: dict[str, pa.DataType], files: list[Path], wanted: Reference
) -> str | None:
    """Return how ids of scoring differ from the reference's; histories are in mappings and frames, not in the files."""
    encoder = Encoder(schema, folder)
    rows = wanted.rows
    expected = [
        {name: wanted.encode(row, name) for name in schema.feature_names}
        | {f"__weights__{name}": wanted.weights(row, name) for name in wanted.weighted}
        for row in rows
    ]
    numbers = np.array([wanted.numbers(row) for row in rows])
    names = list(dict.fromkeys(encoder.columns))
    own = {**kinds, **dict.fromkeys(wanted.made, pa.list_(pa.string()))}
    ways: list[tuple[str, Iterator[Any] | list[Any]]] = [("mappings", [rows]), ("DataFrame", [frame(rows, own)])]
    if not wanted.made:
        ways.append(("file", (piece for path in files for piece in _pieces(path, schema, names))))
    for way, pieces in ways:
        found: list[Row] = []
        dense: list[np.ndarray] = []
        for piece in pieces:
            encoded = encoder.encode(piece)
            if encoded.dense is not None:
                dense.append(encoded.dense)
            lists = [np.split(ids, offsets[1:-1]) for ids, offsets in encoded.lists]
            names_of = [f.name for f in schema.features if f.kind == "list"]
            weights = {
                f"__weights__{name}": np.split(own, offsets[1:-1])
                for name, own, (_, offsets) in zip(names_of, encoded.weights or [], encoded.lists, strict=False)
                if own is not None
            }
            for row in range(encoded.ids.shape[1]):
                singles, several = iter(encoded.ids[:, row].tolist()), iter(lists)
                found.append(
                    {
                        f.name: next(several)[row].tolist() if f.kind == "list" else next(singles)
                        for f in schema.features
                    }
                    | {name: parts[row].tolist() for name, parts in weights.items()}
                )
        for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            if mine != theirs:
                different = {
                    key: (mine.get(key), theirs[key], rows[number].get(key))
                    for key in theirs
                    if mine.get(key) != theirs[key]
                }
                return f"scored as {way}: row {number}: {different}"
        if numbers.size and not np.allclose(np.concatenate(dense), numbers, rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"scored as {way}: dense columns or vectors of rows differ"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if any log differs."""
    parser = argparse.ArgumentParser(description="Prepare and score random logs, against a plain reading of the docs.")
    parser.add_argument("--logs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first log; the others follow")
    parser.add_argument("--spark-every", type=int, default=0, help="every so many logs on Spark, too; 0: none")
    chosen = parser.parse_args(arguments)
    differing, started = 0, time.perf_counter()
    for done, seed in enumerate(range(chosen.seed, chosen.seed + chosen.logs), start=1):
        work = Path(tempfile.mkdtemp(prefix="logs."))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                problem = check(seed, work, bool(chosen.spark_every) and seed % chosen.spark_every == 0)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if problem is not None:
            differing += 1
            print(f"log {seed}: {problem}", flush=True)
        if done % 50 == 0 or done == chosen.logs:
            print(f"{done} logs, {differing} differ, {time.perf_counter() - started:.0f} s", flush=True)
    return min(1, differing)


if __name__ == "__main__":
    sys.exit(main())
