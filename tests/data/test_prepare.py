"""The preparation against a plain Python account of the same protocol."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation import duckdb_engine as duck
from ssr_rec.data.preparation.engines import EngineSettings
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.schema import GROUP_COLUMN, SPLITS
from tests.cases import one_quick, slow
from tests.prepare_log import Row, make_rows, md5_id, run, spec_with, write_csv, write_parquet


def reference(rows: list[Row], split_of: dict[int, str]) -> dict[int, Row]:
    """uid -> the encoded row, by the protocol in plain Python."""
    train = [row for row in rows if split_of[row["uid"]] == "train"]

    def vocabulary(values: list[Any]) -> dict[str, int]:
        counts = Counter(str(value) for value in values if value is not None)
        kept = sorted((value for value in counts if counts[value] >= 3), key=lambda v: (-counts[v], v.encode()))
        return {value: number + 2 for number, value in enumerate(kept)}

    users = vocabulary([row["user"] for row in train])
    cities = vocabulary([row["city"] for row in train])
    tags = vocabulary([tag for row in train for tag in (row["tags"] or [])[:4]])

    def transform(value: float) -> float:
        return math.copysign(math.log1p(abs(value)), value)

    prices = [transform(row["price"]) for row in train if row["price"] is not None]
    low, high = min(prices), max(prices)

    def bucket(value: float | None) -> int:
        if value is None:
            return 0
        return 1 + min(15, max(0, math.floor((transform(value) - low) / (high - low) * 16)))

    return {
        row["uid"]: {
            "user": users.get(str(row["user"]), 1),
            "city": 0 if row["city"] is None else cities.get(row["city"], 1),
            "uid": md5_id(row["uid"], 2**30),
            "price": bucket(row["price"]),
            "tags": [tags.get(str(tag), 1) for tag in (row["tags"] or [])[:4]],
            "click": row["click"],
            GROUP_COLUMN: row["user"],
        }
        for row in rows
    }


@pytest.mark.parametrize(
    ("kind", "suffix"), [("random", "csv"), ("time", "parquet"), slow(("random", "parquet")), slow(("time", "csv"))]
)
def test_every_row_is_what_plain_python_makes_of_it(tmp_path: Path, kind: str, suffix: str) -> None:
    rows = make_rows()
    changes: Row = {}
    if kind == "time":
        changes["split"] = {"type": "time", "column": "day", "boundaries": ["2024-01-17", "2024-01-19"]}
    path = (write_parquet if suffix == "parquet" else write_csv)(rows, tmp_path / f"log.{suffix}")
    schema, splits = run(tmp_path, [path], spec_with(**changes))

    by_hash = {md5_id(row["uid"], 2**30): row for row in rows}
    assert len(by_hash) == len(rows)
    split_of = {by_hash[row["uid"]]["uid"]: split for split in SPLITS for row in splits[split]}
    assert sum(len(found) for found in splits.values()) == len(rows) == len(split_of)
    if kind == "time":
        for row in rows:
            expected = "train" if row["day"] < "2024-01-17" else "validation" if row["day"] < "2024-01-19" else "test"
            assert split_of[row["uid"]] == expected
    expected_rows = reference(rows, split_of)
    for split in SPLITS:
        positives = 0
        for row in splits[split]:
            assert row == expected_rows[by_hash[row["uid"]]["uid"]]
            positives += row["click"]
        assert schema.splits[split].positive_rate["click"] == pytest.approx(positives / len(splits[split]))
    for feature in schema.features:
        found = [row[feature.name] for split in SPLITS for row in splits[split]]
        ids = [i for value in found for i in value] if feature.kind == "list" else found
        assert 0 <= min(ids) <= max(ids) < feature.num_embeddings


def test_vocabulary_files_hold_values_ids_and_counts(tmp_path: Path) -> None:
    schema, splits = run(tmp_path, [write_parquet(make_rows(), tmp_path / "log.parquet")], spec_with())
    (city,) = (feature for feature in schema.features if feature.name == "city")
    words = pq.read_table(tmp_path / "out" / city.encoding.file).to_pydict()  # type: ignore[union-attr]
    assert words["id"] == list(range(2, city.num_embeddings))
    seen = Counter(row["city"] for row in splits["train"])
    assert words["count"] == [seen[i] for i in words["id"]]
    assert list(zip(words["count"], words["value"], strict=True)) == sorted(
        zip(words["count"], words["value"], strict=True), key=lambda pair: (-pair[0], pair[1].encode())
    )


def test_random_split_has_its_ratios_and_no_order(tmp_path: Path) -> None:
    rows = make_rows(20_000)
    _, splits = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with())
    assert len(splits["train"]) == pytest.approx(16_000, abs=5 * math.sqrt(20_000 * 0.8 * 0.2))
    assert len(splits["test"]) == pytest.approx(2_000, abs=5 * math.sqrt(20_000 * 0.1 * 0.9))
    position = {md5_id(row["uid"], 2**30): row["uid"] for row in rows}
    for split in SPLITS:
        order = [position[row["uid"]] for row in splits[split]]
        ranks = {uid: rank for rank, uid in enumerate(sorted(order))}
        count = len(order)
        mean = (count - 1) / 2
        spearman = sum((i - mean) * (ranks[uid] - mean) for i, uid in enumerate(order)) * 12 / (count**3 - count)
        assert abs(spearman) < 5 / math.sqrt(count)
        # Neighbours in the log are no closer after the shuffle than chance has them: |difference| averages a third.
        gaps = [abs(ranks[a] - ranks[b]) for a, b in itertools.pairwise(order)]
        assert sum(gaps) / len(gaps) == pytest.approx(count / 3, rel=5 / math.sqrt(count))


def test_the_result_depends_on_the_seed_but_not_on_threads_or_files(tmp_path: Path) -> None:
    rows = make_rows()
    whole = write_csv(rows, tmp_path / "whole.csv")
    zipped = write_csv(rows, tmp_path / "zipped.csv.gz")
    parts = tmp_path / "parts"
    parts.mkdir()
    write_csv(rows[:1000], parts / "a.csv")
    write_csv(rows[1000:1001], parts / "b.csv.gz")
    write_csv(rows[1001:], parts / "c.csv")
    schema, splits = run(tmp_path, [whole], spec_with(), "1", settings=EngineSettings(threads=1))
    for name, path in (("2", whole), ("3", zipped), ("4", parts), ("5", parts / "*.csv*")):
        again, same = run(tmp_path, [path], spec_with(), name, settings=EngineSettings(threads=2))
        assert same == splits
        assert again == schema
    other, changed = run(tmp_path, [whole], spec_with(), "6", seed=1)
    assert other.dataset_id != schema.dataset_id
    assert changed["test"] != splits["test"]


def test_hashing_is_hashlib_for_text_numbers_and_list_items(tmp_path: Path) -> None:
    rows = make_rows(500)
    schema, splits = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(hash_buckets=1013))
    assert all(feature.num_embeddings == 1014 for feature in schema.features if feature.kind != "numeric")
    expected = Counter(
        (
            md5_id(row["user"], 1013),
            0 if row["city"] is None else md5_id(row["city"], 1013),
            tuple(md5_id(tag, 1013) for tag in (row["tags"] or [])[:4]),
        )
        for row in rows
    )
    found = Counter((row["user"], row["city"], tuple(row["tags"])) for split in SPLITS for row in splits[split])
    assert found == expected


def test_lists_keep_the_end_asked_for(tmp_path: Path) -> None:
    rows = make_rows(500)
    spec = spec_with(lists={"tags": {"max_length": 2, "keep": "last"}}, hash_buckets={"uid": 2**30, "tags": 2**20})
    _, splits = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec)
    expected = Counter(tuple(md5_id(tag, 2**20) for tag in (row["tags"] or [])[-2:]) for row in rows)
    assert Counter(tuple(row["tags"]) for split in SPLITS for row in splits[split]) == expected


def test_text_groups_become_md5_numbers(tmp_path: Path) -> None:
    rows = make_rows(500)
    for row in rows:
        row["user"] = f"u{row['user']}"
    _, splits = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with())
    expected = Counter(int(hashlib.md5(row["user"].encode()).hexdigest()[:15], 16) for row in rows)
    assert Counter(row[GROUP_COLUMN] for split in SPLITS for row in splits[split]) == expected


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_time_ratios_never_divide_a_moment(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(1000)
    for row in rows:
        row["day"] = 5 + row["uid"] // 7  # crosses 9, 10 and 99, 100, where text would sort wrongly
    path = (write_parquet if suffix == "parquet" else write_csv)(rows, tmp_path / f"log.{suffix}")
    spec = spec_with(split={"type": "time", "column": "day", "ratios": [8, 1, 1]})
    schema, splits = run(tmp_path, [path], spec)
    first, second = schema.preparation["split"]["boundaries"]
    by_hash = {md5_id(row["uid"], 2**30): row["day"] for row in rows}
    days = {split: {by_hash[row["uid"]] for row in splits[split]} for split in SPLITS}
    assert max(days["train"]) < first == min(days["validation"])
    assert max(days["validation"]) < second == min(days["test"])
    assert len(splits["train"]) == pytest.approx(800, abs=7)


def test_constant_and_empty_columns_are_one_bucket_and_missing(tmp_path: Path) -> None:
    rows = make_rows(300)
    for row in rows:
        row |= {"price": 7.0, "zero": None, "city": None}
    table = pa.Table.from_pylist(rows)
    table = table.set_column(table.column_names.index("zero"), "zero", pa.nulls(300, pa.float64()))
    table = table.set_column(table.column_names.index("city"), "city", pa.nulls(300, pa.string()))
    pq.write_table(table, tmp_path / "log.parquet")
    schema, splits = run(tmp_path, [tmp_path / "log.parquet"], spec_with(numeric=["price", "zero"]))
    for split in SPLITS:
        assert {(row["price"], row["zero"], row["city"]) for row in splits[split]} == {(1, 0, 0)}
    assert {feature.name: feature.num_embeddings for feature in schema.features}["city"] == 2


@pytest.mark.slow
def test_memory_below_the_data_spills_and_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_with(lists={}, ignore=["day", "tags"])
    path = write_csv(make_rows(20_000), tmp_path / "log.csv")
    schema, splits = run(tmp_path, [path], spec, "roomy")
    tight, same = run(tmp_path, [path], spec, "tight", settings=EngineSettings("120MB"))
    assert (tight, same) == (schema, splits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "roomy", "tight"]
    assert sorted(p.name for p in (tmp_path / "tight").iterdir()) == [
        *("schema.json", "test", "train", "validation", "vocabularies")
    ]


@pytest.mark.parametrize("kind", one_quick("days", "random", "time"))
def test_a_log_staged_on_disk_is_prepared_to_the_same_bytes(tmp_path: Path, monkeypatch, kind: str) -> None:
    rules = {"random": {"type": "random"}, "time": {"type": "time", "column": "day", "ratios": [8, 1, 1]}}
    spec = spec_with(split=rules.get(kind, {"type": "days", "column": "day", "fit_days": 2}))
    path = write_parquet(make_rows(3_000), tmp_path / "log.parquet")
    # A quote in a path must not end a string of SQL.
    here, there = tmp_path / "in its memory", tmp_path / "on the user's disk"
    prepare([str(path)], here, spec)
    staged = []
    monkeypatch.setattr(duck, "STAGED_SHARE", 1e9)
    view = duck.DuckEngine.create_view

    def seen(*arguments: Any) -> Any:
        staged.append(any(tmp_path.glob(".*/.spill/*.duckdb")))
        return view(*arguments)

    monkeypatch.setattr(duck.DuckEngine, "create_view", seen)
    prepare([str(path)], there, spec)
    assert staged and all(staged)
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert all((here / file).read_bytes() == (there / file).read_bytes() for file in files)


def test_preparation_is_recorded(tmp_path: Path) -> None:
    run(tmp_path, [write_csv(make_rows(300), tmp_path / "log.csv")], spec_with(), seed=7)
    recorded = json.loads((tmp_path / "out" / "schema.json").read_text())["preparation"]
    assert recorded["seed"] == 7
    assert recorded["split"] == {"type": "random", "ratios": [0.8, 0.1, 0.1]}
