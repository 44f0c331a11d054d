"""The preparation against a plain Python account of the same protocol, and against every kind of bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.prepare import prepare
from ssr_rec.data.presets import PRESETS
from ssr_rec.data.table_spec import TableSpec, make_spec, read_spec
from ssr_rec.schema import DATASET_ID_KEY, GROUP_COLUMN, SPLITS, Schema

ROOT = Path(__file__).resolve().parents[2]
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
        assert shard.schema_arrow.metadata[DATASET_ID_KEY] == schema.dataset_id.encode()
    return [row for shard in shards for row in shard.read().to_pylist()]


def run(tmp_path: Path, inputs: list[Path], spec: TableSpec, name: str = "out", **options: Any) -> tuple[Schema, Any]:
    folder = tmp_path / name
    schema = prepare([str(path) for path in inputs], folder, spec, **options)
    assert Schema.read(folder) == schema
    return schema, {split: read_split(folder, schema, split) for split in SPLITS}


def md5_id(value: Any, buckets: int) -> int:
    return 1 + int(hashlib.md5(str(value).encode()).hexdigest(), 16) % buckets


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


@pytest.mark.parametrize("kind", ["random", "time"])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
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
    schema, splits = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with())
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
        gaps = [abs(ranks[a] - ranks[b]) for a, b in zip(order, order[1:], strict=False)]
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
    schema, splits = run(tmp_path, [whole], spec_with(), "1", threads=1)
    for name, path in (("2", whole), ("3", zipped), ("4", parts), ("5", parts / "*.csv*")):
        again, same = run(tmp_path, [path], spec_with(), name, threads=2)
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


def test_memory_below_the_data_spills_and_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_with(lists={}, ignore=["day", "tags"])
    path = write_csv(make_rows(20_000), tmp_path / "log.csv")
    schema, splits = run(tmp_path, [path], spec, "roomy")
    tight, same = run(tmp_path, [path], spec, "tight", memory_limit="120MB")
    assert (tight, same) == (schema, splits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "roomy", "tight"]
    assert sorted(p.name for p in (tmp_path / "tight").iterdir()) == [
        *("schema.json", "test", "train", "validation", "vocabularies")
    ]


def alibaba_line(sample: int, index: str, items: list[tuple[str, str, float]], labels: str) -> str:
    features = "\x01".join(f"{field}\x02{feature}\x03{value}" for field, feature, value in items)
    return f"{sample},{labels},{index},{len(items)},{features}\n"


def write_alibaba(folder: Path, part: str, samples: int, users: int) -> list[Row]:
    folder.mkdir(exist_ok=True)
    draw = random.Random(part)
    common: dict[str, Row] = {}
    with (folder / f"common_features_{part}.csv").open("w") as lines:
        for number in range(users):
            items = [("101", str(number), 1.0), ("124", str(number % 2), 1.0)]
            history = [str(draw.randrange(30)) for _ in range(draw.randrange(30))]
            items += [("109_14", feature, 2.5) for feature in history]
            draw.shuffle(items)
            user = {"101": str(number), "124": str(number % 2)}
            user["109_14"] = [feature for field, feature, _ in items if field == "109_14"]  # type: ignore[assignment]
            common[f"i{number}"] = user
            features = "\x01".join(f"{field}\x02{feature}\x03{value}" for field, feature, value in items)
            lines.write(f"i{number},{len(items)},{features}\n")
    rows = []
    with (folder / f"sample_skeleton_{part}.csv").open("w") as lines:
        for sample in range(samples):
            index = f"i{draw.randrange(users)}"
            click = draw.randrange(2)
            pay = draw.randrange(2) if click else 0
            item = str(draw.randrange(50))
            items = [("205", item, 1.0), ("301", "9", 1.0), ("2050", "trap", 1.0)]
            strength = draw.choice([None, 0.5, 4.0])
            if strength is not None:
                items.insert(draw.randrange(3), ("508", f"x{item}", strength))
            lines.write(alibaba_line(sample, index, items, f"{click},{pay}"))
            rows.append({**common[index], "click": click, "pay": pay, "205": item, "508_value": strength})
    return rows


def test_alibaba_joins_and_parses_its_feature_lists(tmp_path: Path) -> None:
    rows = [*write_alibaba(tmp_path / "in", "test", 300, 20), *write_alibaba(tmp_path / "in", "train", 900, 40)]
    preset = PRESETS["alibaba"]
    spec = make_spec({**preset.spec.model_dump(), "hash_buckets": 2**20}, "test")
    schema, splits = run(tmp_path, [tmp_path / "in"], spec, read=preset.read)
    assert schema.labels == ["click", "pay"]
    found = Counter(
        (
            row["click"],
            row["pay"],
            row[GROUP_COLUMN],
            row["124"],
            row["205"],
            tuple(row["109_14"]),
            row["508_value"] > 0,
        )
        for split in SPLITS
        for row in splits[split]
    )
    assert found == Counter(
        (
            *(row["click"], row["pay"], int(row["101"]), md5_id(row["124"], 2**20), md5_id(row["205"], 2**20)),
            *(tuple(md5_id(item, 2**20) for item in row["109_14"][:20]), row["508_value"] is not None),
        )
        for row in rows
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("common_features_train.csv", ("i3,", "i4,"), "common_index is that of an earlier row"),
        ("common_features_train.csv", ("i3,", "j3,"), "common_index is not in the common_features file"),
        ("sample_skeleton_train.csv", (",3,", ",4,"), "feature_count is not the number of features"),
        ("sample_skeleton_train.csv", ("\n5,", "\n5,7,"), "row 6"),
    ],
)
def test_alibaba_refuses_files_that_do_not_fit(
    tmp_path: Path, file: str, change: tuple[str, str], message: str
) -> None:
    write_alibaba(tmp_path / "in", "train", 200, 5)
    path = tmp_path / "in" / file
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    preset = PRESETS["alibaba"]
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "in")], tmp_path / "out", preset.spec, read=preset.read)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_alibaba_needs_both_kinds_of_file(tmp_path: Path) -> None:
    write_alibaba(tmp_path / "in", "train", 200, 5)
    preset = PRESETS["alibaba"]
    with pytest.raises(ValueError, match=r"common_features_train\.csv is not among the inputs"):
        prepare([str(tmp_path / "in" / "sample_skeleton_train.csv")], tmp_path / "o", preset.spec, read=preset.read)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_criteo_sample(tmp_path: Path) -> None:
    source = SHARED / "criteo_small" / "train_first10k.tsv"
    schema, splits = run(tmp_path, [source], PRESETS["criteo"].spec)
    lines = [line.split("\t") for line in source.read_text().splitlines()]
    assert sum(split.num_rows for split in schema.splits.values()) == len(lines) == 10_000
    assert [feature.kind for feature in schema.features].count("numeric") == 13
    assert len(schema.features) == 39
    found = [row for split in SPLITS for row in splits[split]]
    assert sum(row["label"] for row in found) == sum(line[0] == "1" for line in lines)
    for column, name in ((1, "I1"), (14, "C1"), (39, "C26")):
        assert sum(row[name] == 0 for row in found) == sum(line[column] == "" for line in lines)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_avazu_sample(tmp_path: Path) -> None:
    preset = PRESETS["avazu"]
    schema, splits = run(tmp_path, [SHARED / "avazu_small"], preset.spec, read=preset.read)
    assert "id" not in schema.feature_names
    assert "hour" not in schema.feature_names
    assert len(schema.feature_names) == 23
    values = {}
    for name in ("hour_of_day", "weekday"):
        (feature,) = (feature for feature in schema.features if feature.name == name)
        values[name] = pq.read_table(tmp_path / "out" / feature.encoding.file)["value"].to_pylist()  # type: ignore[union-attr]
    # The sample is one hour, 2014-10-21 00:00, a Tuesday.
    assert values == {"hour_of_day": ["00"], "weekday": ["1"]}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
@pytest.mark.parametrize("name", ["kuairand", "ml1m_half"])
def test_shared_specs_name_every_column(name: str) -> None:
    spec = read_spec(ROOT / "configs" / "data" / f"{name}.yaml")
    file = next((SHARED / name).glob("*.parquet"))
    spec.check_columns(pq.read_schema(file).names, file)


def bad_rows(column: str, row: int, value: Any) -> list[Row]:
    rows = make_rows(200)
    rows[row][column] = value
    return rows


CSV_CASES = [
    ("click", 41, 2, r"log\.csv: row 42: column 'click' is 2.0; a label must be 0 or 1"),
    ("click", 41, 0.5, r"log\.csv: row 42: column 'click' is 0.5; a label must be 0 or 1"),
    ("click", 41, "nan", r"log\.csv: row 42: column 'click' is nan; a label must be 0 or 1"),
    ("click", 41, None, r"log\.csv: row 42: column 'click' is missing; a label must be 0 or 1"),
    ("price", 41, "cheap", r"log\.csv: row 42 .*column 'price' must be a number"),
    ("price", 41, "inf", r"log\.csv: row 42: column 'price' is inf; a number must be finite"),
    ("user", 41, None, r"log\.csv: row 42: column 'user' is missing; the group id"),
]


@pytest.mark.parametrize(("column", "row", "value", "message"), CSV_CASES)
def test_bad_values_name_file_column_and_row(tmp_path: Path, column: str, row: int, value: Any, message: str) -> None:
    path = write_csv(bad_rows(column, row, value), tmp_path / "log.csv")
    first = write_csv(make_rows(50), tmp_path / "first.csv")
    refuse(tmp_path, [first, path], spec_with(), message)


def refuse(tmp_path: Path, inputs: list[Path], spec: TableSpec, message: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        prepare([str(path) for path in inputs], tmp_path / "out", spec)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_labels_in_parquet(tmp_path: Path) -> None:
    path = write_parquet(bad_rows("click", 41, None), tmp_path / "log.parquet")
    refuse(tmp_path, [path], spec_with(), r"log\.parquet: row 42: column 'click' is missing")
    rows = [{**row, "click": float(row["click"])} for row in make_rows(200)]
    rows[7]["click"] = math.nan
    path = write_parquet(rows, tmp_path / "nan.parquet")
    refuse(tmp_path, [path], spec_with(), r"nan\.parquet: row 8: column 'click' is nan")


@pytest.mark.parametrize(
    ("line", "message"), [("1,2,3", r"row 101 \('1,2,3'\): not the 7 columns"), ("1,2,3,4,2024-01-01,6,7,8", "row 101")]
)
def test_ragged_rows(tmp_path: Path, line: str, message: str) -> None:
    path = write_csv(make_rows(200), tmp_path / "log.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:101], line, *lines[101:]]) + "\n")
    refuse(tmp_path, [path], spec_with(), message)


def test_truncated_files(tmp_path: Path) -> None:
    whole = write_parquet(make_rows(2000), tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, [tmp_path / "log.parquet"], spec_with(), r"log\.parquet: cannot be read.*complete")
    whole = write_csv(make_rows(2000), tmp_path / "log.csv.gz").read_bytes()
    (tmp_path / "log.csv.gz").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, [tmp_path / "log.csv.gz"], spec_with(), r"log\.csv\.gz: cannot be read.*complete")


def test_wrong_kinds_of_column(tmp_path: Path) -> None:
    path = write_parquet(make_rows(200), tmp_path / "log.parquet")
    lists = SPEC["lists"]
    for changes, message in [
        ({"numeric": ["price", "city"], "categorical": ["user", "uid"]}, "column 'city' holds string, not numbers"),
        (
            {"categorical": ["user", "uid", "city", "tags"], "lists": {}},
            "column 'tags' holds lists; name it under lists",
        ),
        (
            {"categorical": ["uid", "city"], "lists": {**lists, "user": {"max_length": 3}}},
            "'user' holds int64, not lists",
        ),
        ({"categorical": ["uid", "user"], "lists": {**lists, "city": {"max_length": 3}}}, "give its separator"),
        ({"categorical": ["uid", "city", "user", "price"], "numeric": []}, "categorical column 'price' holds float64"),
    ]:
        refuse(tmp_path, [path], spec_with(**changes), rf"log\.parquet: .*{message}")


def test_columns_and_spec_must_agree(tmp_path: Path) -> None:
    path = write_csv(make_rows(200), tmp_path / "log.csv")
    refuse(tmp_path, [path], spec_with(labels=["clicks"], ignore=["day"]), "no label 'clicks', did you mean 'click'")
    refuse(tmp_path, [path], spec_with(ignore=[]), "column 'day' has no role in the spec")
    refuse(tmp_path, [path], spec_with(numeric=["pirce"]), "no column 'pirce', did you mean 'price'")
    refuse(tmp_path, [path], spec_with(ignore=["day", "dya"]), "ignore names 'dya', no such column, did you mean 'day'")


def test_empty_splits_and_inputs(tmp_path: Path) -> None:
    path = write_csv(make_rows(200), tmp_path / "log.csv")
    late = {"type": "time", "column": "day", "boundaries": ["2025-01-01", "2025-01-02"]}
    refuse(tmp_path, [path], spec_with(split=late), "the validation split is empty: 200 rows")
    few = {"type": "time", "column": "day", "ratios": [0.98, 0.01, 0.01]}
    refuse(tmp_path, [path], spec_with(split=few), "too few distinct values")
    kind = {"type": "time", "column": "day", "boundaries": [3, 4]}
    refuse(tmp_path, [path], spec_with(split=kind), "the boundary 3 is not of that kind")
    (tmp_path / "log.csv").write_text("click,user,city,price,day,tags,uid\n")
    refuse(tmp_path, [path], spec_with(), "no rows at all")
    (tmp_path / "log.csv").write_text("")
    refuse(tmp_path, [path], spec_with(), "no rows at all")
    refuse(tmp_path, [tmp_path / "none.csv"], spec_with(), r"none\.csv: no such file")
    refuse(tmp_path, [path, path], spec_with(), "given twice")
    (tmp_path / "log.xlsx").write_text("x")
    refuse(tmp_path, [tmp_path / "log.xlsx"], spec_with(), "unknown kind of file")


def test_the_output_folder_must_be_new_or_empty(tmp_path: Path) -> None:
    path = write_csv(make_rows(200), tmp_path / "log.csv")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    refuse(tmp_path, [path], spec_with(), "out: exists and is not empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: [a", "not readable as YAML"),
        ("- a", "a spec is a mapping"),
        ("name: x\nlabels: [a]\ncategoricals: [b]", "unknown key 'categoricals', did you mean 'categorical'"),
        ("name: x\nlabels: [a]\nlists: {b: {max_lenght: 3}}", "did you mean 'max_length'"),
        ("name: x\nlabels: [a]\ncategorical: [a]", "columns named in two roles: a"),
        ("name: x\nlabels: [a]", "no feature is named"),
        ("name: x\nlabels: [a]\ncategorical: [b]\nmin_count: '6'", "min_count: Input should be a valid integer"),
        ("name: x\nlabels: [a]\ncategorical: [b]\nhash_buckets: {c: 5}", "'c' is neither categorical nor a list"),
        ("name: x\nlabels: [a]\ncategorical: [b]\nsplit: {type: random, ratios: [1, 2]}", "three positive shares"),
        ("name: x\nlabels: [a]\ncategorical: [b]\nsplit: {type: time, column: t}", "either boundaries or ratios"),
    ],
)
def test_bad_specs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_spec(tmp_path / "spec.yaml")
    assert "spec.yaml" in str(raised.value)


def test_preparation_is_recorded(tmp_path: Path) -> None:
    run(tmp_path, [write_csv(make_rows(300), tmp_path / "log.csv")], spec_with(), seed=7)
    recorded = json.loads((tmp_path / "out" / "schema.json").read_text())["preparation"]
    assert recorded["seed"] == 7
    assert recorded["split"] == {"type": "random", "ratios": [0.8, 0.1, 0.1]}
