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
from tests.fuzz.drawn_logs import draw
from tests.fuzz.log_reference import Reference, Row

CONTAINERS = ("csv", "tsv.gz", "parquet", "pandas.parquet")


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
                if not wanted.is_refused(str(error)):
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
            if problem := wrong_figures(schema, wanted):
                return f"{where}: {problem}"
            if engine is None and (problem := scoring_problem(schema, output, kinds, files, wanted)):
                return f"{where}: {problem}"
    return None


def wrong_figures(schema: Schema, wanted: Reference) -> str | None:
    """Return what the schema says otherwise of splits, number labels and the bins of dense columns."""
    found: dict[str, Any] = {
        name: (split.num_rows, split.positive_rate, split.counted, split.groups)
        for name, split in schema.splits.items()
    }
    for number in schema.numbers:
        found[number.name] = [getattr(number, key) for key in type(number).model_fields if key != "name"]
    found |= {column.name: column.edges for column in schema.dense}
    for name, figures in wanted.figures().items():
        exact = name in schema.splits
        same = found[name] == figures if exact else same_numbers(found[name], figures)
        if not same:
            return f"schema: {name}: {found[name]}, not {figures}"
    return None


def same_numbers(found: Sequence[float | None], wanted: Sequence[float | None]) -> bool:
    mine, theirs = (np.array(side, dtype=np.float64) for side in (found, wanted))
    return mine.shape == theirs.shape and np.allclose(mine, theirs, rtol=1e-6, atol=1e-12, equal_nan=True)


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
