"""A dataset prepared on Spark is the one prepared on DuckDB, byte for byte; bad input is refused in the same words."""

from __future__ import annotations

import datetime
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.engines import EngineSettings, SparkSettings
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.presets import PRESETS
from ssr_rec.data.preparation.sources import Read, read_table
from ssr_rec.data.preparation.spec import TableSpec, make_spec, read_spec
from ssr_rec.data.schema import Schema
from tests.data.test_number_labels import SPEC as NUMBER_SPEC
from tests.data.test_number_labels import watched
from tests.data.test_presets import write_alibaba
from tests.data.test_row_weights import SPEC as WEIGHT_SPEC
from tests.data.test_row_weights import weighted_rows
from tests.dense_log import SPEC as DENSE_SPEC
from tests.dense_log import frame
from tests.model.test_given_vectors import ITEMS
from tests.model.test_given_vectors import SPEC as VECTOR_SPEC
from tests.model.test_given_vectors import rows as vector_rows
from tests.odd_rows import SPEC as ODD_SPEC
from tests.odd_rows import odd_rows
from tests.prepare_log import ROOT, SHARED, Row, make_rows, spec_with, write_csv, write_parquet
from tests.weighted_log import SPEC as WEIGHTED_SPEC
from tests.weighted_log import frame as weighted_frame
from tools.prepare_data import main

pytestmark = [pytest.mark.slow, pytest.mark.spark]


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[Any]:
    """One Spark for all tests: it takes some 20 seconds to start."""
    pytest.importorskip("pyspark", reason="pyspark is not installed: pip install -e '.[spark]'")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not on the PATH")
    from ssr_rec.data.preparation.spark_engine import start

    settings = {
        "spark.sql.shuffle.partitions": "3",
        # A small log is over before a plan is adapted or compiled.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.codegen.wholeStage": "false",
        "spark.ui.enabled": "false",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    }
    running = start("local[2]", settings, "2GB")
    yield running
    running.stop()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(tmp_path: Path, inputs: list[Path], spec: TableSpec, read: Read = read_table, **options: Any) -> Schema:
    """Prepare on both engines, compare every byte, and return the schema."""
    names = [str(path) for path in inputs]
    schema = prepare(names, tmp_path / "duckdb", spec, read=read, **options)
    on_spark = prepare(
        names, tmp_path / "spark", spec, read=read, settings=EngineSettings(spark=SparkSettings()), **options
    )
    assert on_spark == schema
    expected, found = files_of(tmp_path / "duckdb"), files_of(tmp_path / "spark")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    return schema


def test_down_sampled_rows_are_the_same(tmp_path):
    split = {"type": "time", "column": "day", "boundaries": ["2024-01-12", "2024-01-16"]}
    spec = spec_with(split=split, negatives=0.3)
    schema = same(tmp_path, [write_parquet(make_rows(900), tmp_path / "log.parquet")], spec, seed=3)
    assert schema.negatives == 0.3 and schema.splits["train"].num_rows < 400


def test_dense_columns_are_the_same(tmp_path):
    # From tiny to huge, so that an engine's own sums, or another logarithm, would show.
    exponents = np.linspace(-300, 300, 3000)
    log = frame(3000).assign(price=np.resize([1.5, -2.25, 1 / 3], 3000) * 10.0**exponents)
    log.to_parquet(tmp_path / "log.parquet")
    schema = same(
        tmp_path,
        [tmp_path / "log.parquet"],
        make_spec({**DENSE_SPEC, "ignore": ["row"], "split": {"type": "random"}}, "test"),
    )
    assert [column.name for column in schema.dense] == ["price", "age", "never"]


def test_weights_of_items_are_the_same(tmp_path):
    weighted_frame().to_parquet(tmp_path / "log.parquet")
    schema = same(tmp_path, [tmp_path / "log.parquet"], make_spec(WEIGHTED_SPEC, "test"))
    assert [feature.name for feature in schema.weighted_lists] == ["tags", "words"]


def test_given_vectors_and_those_of_rows_are_the_same(tmp_path):
    log = vector_rows().assign(thumb=[None if n % 9 == 2 else [n / 3, -1e-3 * n] for n in range(600)])
    log.to_parquet(tmp_path / "log.parquet")
    pq.write_table(pa.table({"item": ITEMS, "vector": np.eye(30).tolist()}), tmp_path / "text.parquet")
    vectors = {"text": {"of": "item", "file": str(tmp_path / "text.parquet")}}
    spec = {**VECTOR_SPEC, "vectors": vectors, "row_vectors": {"thumb": 2}}
    schema = same(tmp_path, [tmp_path / "log.parquet"], make_spec(spec, "test"))
    assert schema.dense_widths == [2] and schema.features[-1].vectors is not None


def refusal(inputs: list[Path], output: Path, spec: TableSpec, **options: Any) -> str:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(ValueError) as raised:
        prepare([str(path) for path in inputs], output, spec, **options)
    assert sorted(output.parent.rglob("*")) == before
    return str(raised.value)


def test_odd_values_in_several_parquet_files_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssr_rec.data.shards.ROWS_PER_SHARD", 4096)
    rows = odd_rows(14_000, seed=3)
    first = pa.Table.from_pylist(rows)
    kinds = first.schema
    paths = []
    for number, (start, stop) in enumerate([(0, 3000), (3000, 3000), (3000, 3001), (3001, 14_000)]):
        paths.append(tmp_path / f"{9 - number}.parquet")  # in the order given, not by name
        pq.write_table(pa.Table.from_pylist(rows[start:stop], kinds), paths[-1], row_group_size=1000)
    schema = same(tmp_path, paths, make_spec(ODD_SPEC, "test"), seed=5)
    assert [len(schema.splits[name].shards) for name in schema.splits] == [3, 1, 1]


def test_quoted_and_zipped_text_split_by_time(tmp_path: Path) -> None:
    draw = random.Random(2)
    odd = [
        "",
        "Köln",
        "漢字",
        "a,b",
        'say ""hi""',
        "two\nlines",
        " padded ",
        "'",
        "\\",
        "NULL",
        "nan",
        "🙂",
        "İ",
        "\u00a0",
    ]
    lines = ["click,user,city,price,day,tags,uid"]
    for row in make_rows(3000):
        tags = "" if row["tags"] is None else "|".join(map(str, row["tags"]))
        price = draw.choice(
            ["", "nan", "1e-3", "-0.0", "+5", " 7 ", f"{draw.uniform(-9, 9):.17g}", str(2 ** draw.randrange(60) - 1)]
        )
        lines.append(f'{row["click"]},{row["user"]},"{draw.choice(odd)}",{price},{row["day"]},{tags},{row["uid"]}')
    # The user is not a whole number throughout.
    lines[7] = f'0,"7\n",,,2024-01-01,,{10**6}'
    (tmp_path / "a.csv").write_text("\n".join(lines[:1500]) + "\n")
    (tmp_path / "b.csv").write_text("\r\n".join([lines[0], *lines[1500:1501]]) + "\r\n")
    write_csv(make_rows(400, seed=4), tmp_path / "c.csv.gz")
    (tmp_path / "d.csv").write_text("\n".join([lines[0], *lines[1501:]]))  # no newline at the end
    spec = spec_with(split={"type": "time", "column": "day", "ratios": [8, 1, 1]}, num_buckets=60)
    same(tmp_path, [tmp_path / f"{name}.csv" for name in "ab"] + [tmp_path / "c.csv.gz", tmp_path / "d.csv"], spec)


def test_numbers_on_the_edges_of_buckets(tmp_path: Path) -> None:
    """ln(1 + v) of these is half the range's end, and Java's is off by its last bit."""
    edges = [2, 47, 73, 298, 333, 345]
    names = [f"to{edge}" for edge in edges]
    rows = [{"click": k % 2} | {f"to{v}": [0, v, (1 + v) ** 2 - 1][k % 3] for v in edges} for k in range(240)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    entries = {"name": "edges", "labels": ["click"], "numeric": names, "num_buckets": 2}
    same(tmp_path, [tmp_path / "log.parquet"], make_spec(entries, "test"))


KINDS: dict[str, Any] = {
    "text": str,
    "moments": lambda text: datetime.datetime.fromisoformat(f"{text}T{int(text[-2:]):02d}:59:59"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_days_of_two_kinds_and_groups_that_are_text(tmp_path: Path, kind: str) -> None:
    rows = [{**row, "day": KINDS[kind](row["day"])} for row in make_rows(1000)]
    for row in rows:
        row["user"] = f"u{row['user']}" if kind == "text" else str(row["user"])
    changes: Row = {"split": {"type": "days", "column": "day", "fit_days": 3}, "hash_buckets": 1013}
    schema = same(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(**changes))
    assert schema.days is not None and len(schema.days.names) == 20


def test_days_added_with_new_values(tmp_path: Path) -> None:
    rows = make_rows(2400)
    early = write_parquet([row for row in rows if row["day"] < "2024-01-19"], tmp_path / "early.parquet")
    late = write_parquet([row for row in rows if row["day"] >= "2024-01-19"], tmp_path / "late.parquet")
    same(tmp_path, [early], spec_with(split={"type": "days", "column": "day", "fit_days": 2}))
    schema = add([str(late)], tmp_path / "duckdb", extend=True)
    assert add([str(late)], tmp_path / "spark", extend=True, settings=EngineSettings(spark=SparkSettings())) == schema
    assert schema.additions[0].grown
    assert files_of(tmp_path / "spark") == files_of(tmp_path / "duckdb")


def test_unsigned_and_narrow_types(tmp_path: Path) -> None:
    rows = make_rows(500)
    table = pa.Table.from_pylist(rows)
    for name, kind in (("user", pa.uint16()), ("uid", pa.uint32()), ("price", pa.float32()), ("click", pa.bool_())):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind, safe=False))
    pq.write_table(table, tmp_path / "log.parquet")
    same(tmp_path, [tmp_path / "log.parquet"], spec_with())
    ignored = spec_with(categorical=["city", "uid"])
    for kind in (pa.uint64(), pa.timestamp("us", "UTC")):
        wide = table.set_column(table.column_names.index("user"), "user", table["user"].cast(pa.int64()).cast(kind))
        pq.write_table(wide, tmp_path / "wide.parquet")
        if kind == pa.uint64():
            same(tmp_path / "wide", [tmp_path / "wide.parquet"], ignored)
        else:
            said = refusal(
                [tmp_path / "wide.parquet"], tmp_path / "no", ignored, settings=EngineSettings(spark=SparkSettings())
            )
            assert "holds timestamp" in said


def test_alibaba_joins_its_files(tmp_path: Path) -> None:
    write_alibaba(tmp_path / "in", "test", 300, 20)
    write_alibaba(tmp_path / "in", "train", 900, 40)
    preset = PRESETS["alibaba"]
    same(tmp_path, [tmp_path / "in"], preset.spec, read=preset.read)


def bad_text(row: int, column: str, value: str) -> str:
    rows = make_rows(200)
    lines = [",".join(rows[0])]
    for number, entry in enumerate(rows):
        cells = {name: "" if cell is None or isinstance(cell, list) else f'"{cell}"' for name, cell in entry.items()}
        if number == row:
            cells[column] = value
        lines.append(",".join(cells.values()))
    return "\n".join(lines) + "\n"


BAD = {
    "label": bad_text(41, "click", "2"),
    "no label": bad_text(41, "click", ""),
    "nan label": bad_text(41, "click", "nan"),
    "not a number": bad_text(41, "price", "cheap"),
    "infinite": bad_text(41, "price", "inf"),
    "no group": bad_text(41, "user", ""),
    "ragged": bad_text(41, "user", "1,2"),
    "another header": bad_text(41, "user", "1").replace("price", "cost", 1),
    "no rows": "",
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_input_is_refused_in_the_same_words(tmp_path: Path, kind: str) -> None:
    write_csv(make_rows(50), tmp_path / "first.csv")
    (tmp_path / "log.csv").write_text(BAD[kind])
    inputs = [tmp_path / "first.csv", tmp_path / "log.csv"]
    expected = refusal(inputs, tmp_path / "out", spec_with())
    assert "log.csv" in expected
    assert refusal(inputs, tmp_path / "out", spec_with(), settings=EngineSettings(spark=SparkSettings())) == expected


def test_broken_files_are_named(tmp_path: Path) -> None:
    for path in (
        write_parquet(make_rows(2000), tmp_path / "l.parquet"),
        write_csv(make_rows(2000), tmp_path / "l.csv.gz"),
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        message = refusal([path], tmp_path / "out", spec_with(), settings=EngineSettings(spark=SparkSettings()))
        assert message.startswith(f"{path}: cannot be read") and "is it complete?" in message


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: toy, labels: [click], categorical: [user], ignore: [city, price, day, tags, uid]}")
    log = write_parquet(make_rows(400), tmp_path / "log.parquet")
    command = ["table", "--spec", str(spec), "--input", str(log), "--output"]
    assert main([*command, str(tmp_path / "a")]) == 0
    on_duckdb = json.loads(capsys.readouterr().out.splitlines()[-1])
    # As URLs, which executors open as they would those of an object store.
    command = ["table", "--spec", str(spec), "--input", f"file://{log}", "--output", f"file://{tmp_path}/b"]
    assert main([*command, "--engine", "spark", "--spark-master", "local[2]"]) == 0
    on_spark = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("rows", "splits", "dataset_id"):
        assert on_spark[key] == on_duckdb[key]
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
@pytest.mark.parametrize("name", ["criteo", "avazu", "kuairand"])
def test_the_shared_samples(tmp_path: Path, name: str) -> None:
    if name == "kuairand":
        same(tmp_path, [SHARED / "kuairand"], read_spec(ROOT / "configs" / "data" / "kuairand.yaml"))
    else:
        same(tmp_path, [SHARED / f"{name}_small"], PRESETS[name].spec, read=PRESETS[name].read)


def test_weights_missing_labels_and_spaces(tmp_path: Path) -> None:
    rows = weighted_rows(900)
    path = write_csv(rows, tmp_path / "log.csv")
    schema = same(tmp_path, [path], spec_with(**WEIGHT_SPEC))
    assert schema.weight == "w" and schema.missing_labels == ["pay", "like"]
    for row in rows:
        row["like"] = math.nan if row["like"] is None else float(row["like"])
    (tmp_path / "nan").mkdir()
    nan = same(tmp_path / "nan", [write_parquet(rows, tmp_path / "nan" / "log.parquet")], spec_with(**WEIGHT_SPEC))
    assert [split.counted for split in nan.splits.values()] == [split.counted for split in schema.splits.values()]
    for name, bad in {"nan": math.nan, "negative": -1.0, "null": None, "infinite": math.inf}.items():
        rows[41]["w"] = bad
        path = write_parquet(rows, tmp_path / f"{name}.parquet")
        messages = [
            refusal([path], tmp_path / "out", spec_with(**WEIGHT_SPEC), settings=EngineSettings(spark=spark))
            for spark in (None, SparkSettings())
        ]
        assert messages[0] == messages[1] and "row 42: column 'w' is" in messages[0]


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    rows = watched(900)
    schema = same(tmp_path, [write_csv(rows, tmp_path / "log.csv")], spec_with(**NUMBER_SPEC))
    assert schema.number_names == ["watch_s", "rating"]
    (tmp_path / "nan").mkdir()
    nans = [row | {"rating": math.nan if row["rating"] is None else row["rating"]} for row in rows]
    nan = same(tmp_path / "nan", [write_parquet(nans, tmp_path / "nan" / "log.parquet")], spec_with(**NUMBER_SPEC))
    assert [split.counted for split in nan.splits.values()] == [split.counted for split in schema.splits.values()]
    clicked = next(at for at, row in enumerate(rows) if row["click"])
    for at, column, bad in [
        (clicked, "watch_s", math.nan), (41, "rating", 1e39), (41, "rating", -math.inf),
    ]:  # fmt: skip
        path = write_parquet(
            [row | ({column: bad} if n == at else {}) for n, row in enumerate(rows)], tmp_path / "bad.parquet"
        )
        messages = [
            refusal([path], tmp_path / "out", spec_with(**NUMBER_SPEC), settings=EngineSettings(spark=spark))
            for spark in (None, SparkSettings())
        ]
        assert messages[0] == messages[1] and f"row {at + 1}: column {column!r} is" in messages[0]


@pytest.mark.parametrize("kind", ["random", "days"])
def test_groups_together(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssr_rec.data.shards.ROWS_PER_SHARD", 4_096)
    rows = [{**row, "request": f"r{row['uid'] // 7 * 13 % 5000}"} for row in make_rows(9_000)]
    paths = [write_parquet(rows[:4000], tmp_path / "a.parquet"), write_parquet(rows[4000:], tmp_path / "b.parquet")]
    days = {"type": "days", "column": "day", "fit_days": 3}
    split = days if kind == "days" else {"type": "random", "ratios": [8, 1, 1]}
    changes: Row = {"together": "request", "split": split, "ignore": ["request", *["day"] * (kind == "random")]}
    schema = same(tmp_path, paths, spec_with(**changes))
    assert all(found.groups for found in schema.splits.values())
    assert kind == "days" or len(schema.splits["train"].shards) == 2
