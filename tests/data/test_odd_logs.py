"""Logs as they come in real life: what is stored is what the file named says, or a refusal names the cause."""

from __future__ import annotations

import datetime
import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from ssr_rec.data.preparation.module_names import MODULE_NAMES
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from tests.cases import one_quick, slow

SPEC = {"name": "odd", "labels": ["click"], "categorical": ["item"], "min_count": 1}


def prepared(folder: Path, inputs: list[Path], **changes: Any) -> tuple[Schema, pd.DataFrame]:
    """The schema, and all rows with the text behind every id of a vocabulary; ``split`` is where a row went."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    schema = prepare([str(path) for path in inputs], out, make_spec({**SPEC, **changes}, "spec"))
    frames = []
    for name, split in schema.splits.items():
        frames += [pq.read_table(out / shard.path).to_pandas().assign(split=name) for shard in split.shards]
    rows = pd.concat(frames, ignore_index=True)
    for feature in schema.features:
        if feature.encoding.type == "vocabulary":
            table = pq.read_table(out / feature.encoding.file).to_pydict()
            texts = {0: None, 1: "?"} | dict(zip(table["id"], table["value"], strict=True))
            rows[feature.name] = [
                [texts[i] for i in ids] if feature.kind == "list" else texts[ids] for ids in rows[feature.name]
            ]
    return schema, rows


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = max(len(values) for values in columns.values())
    table = pa.table({"click": [i % 2 for i in range(count)], **columns})
    if path.suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("folder", one_quick("click=1", "item=5", "date=2024-01-01"))
def test_a_folder_called_key_value_says_nothing_of_the_rows(tmp_path, suffix, folder):
    path = write(tmp_path / folder / f"log.{suffix}", item=[f"i{i % 10}" for i in range(200)])
    _, rows = prepared(tmp_path, [path])
    assert rows["click"].mean() == 0.5 and rows["item"].nunique() == 10


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("named", "beside"), one_quick(("day[1]", "day1"), ("log*", "log2"), ("a?b", "axb"), ("r[1]/x", "r1/x"))
)
def test_a_file_named_like_a_pattern_is_the_file_that_is_read(tmp_path, suffix, named, beside):
    path = write(tmp_path / f"{named}.{suffix}", item=["right"] * 200)
    write(tmp_path / f"{beside}.{suffix}", item=["wrong"] * 300)
    _, rows = prepared(tmp_path, [path])
    assert rows["item"].tolist() == ["right"] * 200


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rowid", "DuckDB numbers its rows"),
        ("RowId", "DuckDB numbers its rows"),
        ("a\0b", "a NUL"),
        ("x" * 300, "longer than 200 bytes"),
        ("type", "PyTorch takes no table"),
        ("values", "PyTorch takes no table"),
        ("items", "PyTorch takes no table"),
        ("to", "PyTorch takes no table"),
        ("device.os", "PyTorch takes no table"),
        ("ITEM", "differ by case alone"),
    ],
)
def test_a_name_that_could_not_be_used_later_is_refused_at_once(name, why):
    with pytest.raises(ValueError, match=why):
        make_spec({**SPEC, "categorical": ["item", name]}, "spec")


def test_every_name_that_this_pytorch_has_taken_is_known():
    assert {name for name in dir(nn.ModuleDict()) if not name.startswith("__")} <= MODULE_NAMES


@pytest.mark.parametrize(
    ("one", "other", "counts"),
    [
        slow((pa.array([True, False] * 50), pa.array([0, 1] * 50), {"true": 50, "false": 50, "0": 50, "1": 50})),
        (pa.array([7, 8] * 50), pa.array(["007", "7"] * 50), {"7": 100, "8": 50, "007": 50}),
        (
            pa.array([datetime.date(2024, 5, 6)] * 100),
            pa.array(["2024-05-06 10:00:00", "2024-05-06"] * 50),
            {"2024-05-06": 150, "2024-05-06 10:00:00": 50},
        ),
        slow((pa.array([1, 2] * 50, pa.int8()), pa.array([1, 300] * 50), {"1": 100, "2": 50, "300": 50})),
        (pa.array([1, 2] * 50), pa.array([2**64 - 1, 2] * 50, pa.uint64()), {"1": 50, "2": 100, str(2**64 - 1): 50}),
        slow((pa.nulls(100), pa.array(["A", "B"] * 50), {None: 100, "A": 50, "B": 50})),
        (pa.array([1.0, None] * 50), pa.array([1, 24] * 50), {"1": 100, "24": 50, None: 50}),
    ],
    ids=["bool, int", "int, text", "date, text", "int8, int64", "int, uint64", "nothing, text", "gaps, int"],
)
def test_values_keep_their_text_in_any_order_of_files(tmp_path, one, other, counts):
    files = [write(tmp_path / "a.parquet", item=one), write(tmp_path / "b.parquet", item=other)]
    for order in (files, files[::-1]):
        _, rows = prepared(tmp_path, order)
        assert Counter(rows["item"].replace({np.nan: None})) == counts


def test_times_of_two_kinds_are_refused_with_both_files(tmp_path):
    dates = write(tmp_path / "a.parquet", item=["x"] * 100, t=pa.array([datetime.date(2024, 5, 6)] * 100))
    texts = write(tmp_path / "b.parquet", item=["x"] * 100, t=["2024-05-06 10:00:00"] * 100)
    for order in ([dates, texts], [texts, dates]):
        with pytest.raises(ValueError, match=r"time column 't' holds .* in .*[ab]\.parquet and .* in .*[ab]\.parquet"):
            prepared(tmp_path, order, split={"type": "time", "column": "t", "ratios": [2, 1, 1]})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_empty_text_is_an_empty_list_and_a_missing_value(tmp_path, suffix):
    path = write(tmp_path / f"log.{suffix}", item=["", "a"] * 50, tags=["", "x|y"] * 50)
    _, rows = prepared(tmp_path, [path], lists={"tags": {"max_length": 3, "separator": "|"}})
    assert Counter(rows["item"].replace({np.nan: None})) == {None: 50, "a": 50}
    assert Counter(map(tuple, rows["tags"])) == {(): 50, ("x", "y"): 50}


def test_a_list_of_nothing_is_an_empty_list(tmp_path):
    path = write(tmp_path / "log.parquet", item=["a"] * 100, tags=pa.array([[]] * 100, pa.list_(pa.null())))
    _, rows = prepared(tmp_path, [path], lists={"tags": {"max_length": 3}})
    assert all(len(tags) == 0 for tags in rows["tags"])


@pytest.mark.parametrize("role", ["group_id", "time"])
def test_nan_is_refused_like_null(tmp_path, role):
    path = write(tmp_path / "log.parquet", item=["a"] * 100, t=[float(i) for i in range(99)] + [float("nan")])
    changes = (
        {"group_id": "t"} if role == "group_id" else {"split": {"type": "time", "column": "t", "ratios": [2, 1, 1]}}
    )
    with pytest.raises(ValueError, match=r"row 100: column 't' is missing"):
        prepared(tmp_path, [path], **changes)


def test_nan_among_many_numbers_is_missing(tmp_path):
    """A parquet file's statistics do not tell of NaN."""
    path = write(tmp_path / "log.parquet", p=[float(i) for i in range(150)] + [float("nan")] * 50)
    schema, rows = prepared(tmp_path, [path], categorical=[], numeric=["p"])
    assert (rows["p"] == schema.features[0].encoding.missing_id).sum() == 50


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_times_are_compared_as_numbers(tmp_path, suffix):
    path = write(tmp_path / f"log.{suffix}", item=["a"] * 200, t=np.arange(200) + 0.5)
    schema, rows = prepared(tmp_path, [path], split={"type": "time", "column": "t", "ratios": [2, 1, 1]})
    assert Counter(rows["split"]) == {"train": 100, "validation": 50, "test": 50}
    assert [float(b) for b in schema.preparation["split"]["boundaries"]] == [100.5, 150.5]
    nanoseconds = write(tmp_path / f"ns.{suffix}", item=["a"] * 200, t=1714953600000000000 + np.arange(200))
    boundaries = [1714953600000000100, 1714953600000000150]
    _, rows = prepared(tmp_path, [nanoseconds], split={"type": "time", "column": "t", "boundaries": boundaries})
    assert Counter(rows["split"]) == {"train": 100, "validation": 50, "test": 50}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_days_that_are_numbers_come_in_their_order(tmp_path, suffix):
    path = write(tmp_path / f"log.{suffix}", item=["a"] * 200, d=9.0 + np.arange(200) // 50)
    schema, _ = prepared(tmp_path, [path], split={"type": "days", "column": "d"})
    assert [float(day) for day in schema.days.names] == [9, 10, 11, 12]


def test_group_ids_beyond_int64_are_told_apart(tmp_path):
    groups = [2**63 + i % 10 for i in range(100)]
    as_numbers = write(tmp_path / "a.parquet", item=["a"] * 100, g=pa.array(groups, pa.uint64()))
    as_text = write(tmp_path / "b.parquet", item=["a"] * 100, g=[str(group) for group in groups])
    found = [prepared(tmp_path, [path], group_id="g")[1][GROUP_COLUMN].tolist() for path in (as_numbers, as_text)]
    assert found[0] == found[1] and len(set(found[0])) == 10


@pytest.mark.parametrize("where", ["header", "body", "twice"])
def test_line_ends_of_several_kinds_are_named(tmp_path, where):
    lines = [f"{i % 2},i{i % 5}" for i in range(100)]
    text = {
        "header": "click,item\r\n" + "\n".join(lines) + "\n",
        "body": "\n".join(["click,item", *lines[:50]]) + "\n" + "\r\n".join(lines[50:]) + "\r\n",
        "twice": "\r\r\n".join(["click,item", *lines]) + "\r\r\n",
    }[where]
    (tmp_path / "log.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match=r"log\.csv: line \d+ ends in b'.*' and those before in b'.*'; give all lines"):
        prepared(tmp_path, [tmp_path / "log.csv"])


def test_a_number_that_moves_only_after_training_has_the_trained_bucket(tmp_path):
    t = np.repeat([0, 1, 2], 20)
    later = np.where(t == 0, 5.0, 10.0 ** (np.arange(60) % 5))
    absent = pa.array([None if k == 0 else 50.0 for k in t], pa.float64())
    path = write(tmp_path / "log.parquet", p=later, q=absent, t=t)
    split = {"type": "time", "column": "t", "boundaries": [1, 2]}
    _, rows = prepared(tmp_path, [path], categorical=[], numeric=["p", "q"], split=split)
    assert rows["p"].tolist() == [1] * 60
    assert Counter(rows["q"]) == {0: 20, 1: 40}


def test_separators_of_several_letters_and_dat_files(tmp_path):
    (tmp_path / "log.dat").write_text("click::item\n" + "".join(f"{i % 2}::i{i % 5}\n" for i in range(100)))
    _, rows = prepared(tmp_path, [tmp_path / "log.dat"], text={"delimiter": "::"})
    assert Counter(rows["item"]) == {f"i{i}": 20 for i in range(5)}


def test_an_index_of_pandas_is_no_column_of_the_log(tmp_path):
    frame = pd.DataFrame({"click": [0, 1] * 50, "item": ["a"] * 100}, index=range(100, 0, -1))
    frame.to_parquet(tmp_path / "log.parquet")
    assert len(prepared(tmp_path, [tmp_path / "log.parquet"])[1]) == 100
    frame.to_csv(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="column 'Unnamed: 0' has no role in the spec; add it to ignore"):
        prepared(tmp_path, [tmp_path / "log.csv"])
    assert len(prepared(tmp_path, [tmp_path / "log.csv"], ignore=["Unnamed: 0"])[1]) == 100


def test_all_columns_without_a_role_are_named_at_once(tmp_path):
    path = write(tmp_path / "log.parquet", item=["a"] * 10, b=[1] * 10, c=[1] * 10)
    with pytest.raises(ValueError, match="columns 'b', 'c' have no role"):
        prepared(tmp_path, [path])


def test_a_header_without_end_is_refused_within_bounds(tmp_path):
    with gzip.open(tmp_path / "log.csv.gz", "wb", compresslevel=1) as file:
        file.write(b"a" * 2**23)
    with pytest.raises(ValueError, match="its first line is longer than"):
        prepared(tmp_path, [tmp_path / "log.csv.gz"])
