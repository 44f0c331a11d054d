"""Every kind of bad input is refused by name, and nothing half-written stays."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from ssr_rec.data import shards
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import TableSpec, read_spec
from ssr_rec.data.schema import GROUP_COLUMN
from tests.prepare_log import ROOT, SPEC, Row, make_rows, read_split, spec_with, write_csv, write_parquet


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


def test_a_number_that_is_the_time_as_well_is_checked_as_a_number(tmp_path: Path) -> None:
    rows = [{**row, "price": 15.0 if row["price"] is None else row["price"]} for row in bad_rows("price", 41, "inf")]
    spec = spec_with(split={"type": "time", "column": "price", "boundaries": [10, 20]})
    path = write_csv(rows, tmp_path / "log.csv")
    refuse(tmp_path, [path], spec, "row 42: column 'price' is inf; a number must be finite; .*; the time of the split")


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
    text = write_csv(make_rows(2000), tmp_path / "log.csv.gz").read_bytes()
    (tmp_path / "log.csv.gz").write_bytes(text[: len(text) // 2])
    refuse(tmp_path, [tmp_path / "log.csv.gz"], spec_with(), r"log\.csv\.gz: cannot be read.*complete")


def test_wrong_kinds_of_column(tmp_path: Path) -> None:
    path = write_parquet(make_rows(200), tmp_path / "log.parquet")
    lists = SPEC["lists"]
    cases: list[tuple[Row, str]] = [
        ({"numeric": ["price", "city"], "categorical": ["user", "uid"]}, "column 'city' holds string, not numbers"),
        (
            {"categorical": ["user", "uid", "city", "tags"], "lists": {}},
            "column 'tags' holds lists; name it under lists",
        ),
        (
            {"categorical": ["uid", "city"], "lists": {**lists, "user": {"max_length": 3}}},
            "'user' holds int64, not lists",
        ),
        (
            {"categorical": ["uid", "user"], "lists": {**lists, "city": {"max_length": 3}}},
            "give its separator.*lists: {city:",
        ),
        ({"categorical": ["uid", "city", "user", "price"], "numeric": []}, "categorical column 'price' holds float64"),
    ]
    for changes, message in cases:
        refuse(tmp_path, [path], spec_with(**changes), rf"log\.parquet: .*{message}")


def test_columns_and_spec_must_agree(tmp_path: Path) -> None:
    path = write_csv(make_rows(200), tmp_path / "log.csv")
    refuse(tmp_path, [path], spec_with(labels=["clicks"], ignore=["day"]), "no label 'clicks', did you mean 'click'")
    refuse(tmp_path, [path], spec_with(ignore=[]), "column 'day' has no role in the spec")
    refuse(tmp_path, [path], spec_with(numeric=["pirce"]), "no column 'pirce', did you mean 'price'")
    refuse(tmp_path, [path], spec_with(ignore=["day", "dya"]), "ignore names 'dya', no such column, did you mean 'day'")
    text = path.read_text()
    for mark in (";", "|", "\t"):
        path.write_text(text.replace(",", mark))
        fix = re.escape(f"text: {{delimiter: {json.dumps(mark)}}}")
        refuse(
            tmp_path, [path], spec_with(), f"no label 'click'; it has .*, not cut into columns; say in the spec {fix}"
        )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("%d.%m.%Y", {"type": "time", "ratios": [8, 1, 1]}), ("%m/%d/%Y 12:30", {"type": "days", "fit_days": 3})],
)
def test_dates_whose_year_comes_last_do_not_sort_by_time(tmp_path: Path, shape: str, kind: dict[str, Any]) -> None:
    rows = [{**row, "day": f"{date.fromisoformat(row['day']):{shape}}"} for row in make_rows(200)]
    path = write_csv(rows, tmp_path / "log.csv")
    first = re.escape(repr(min(row["day"] for row in rows)))
    refuse(
        tmp_path,
        [path],
        spec_with(split={**kind, "column": "day"}),
        f"'day' holds {first}, and such text does not sort by time",
    )


def test_what_is_no_time_may_look_like_such_a_date_and_a_time_may_begin_like_one(tmp_path: Path) -> None:
    """Groups need no order, and text of fixed width sorts."""
    rows = [
        {**row, "user": f"{1 + row['user'] % 28:02}.09.2026", "day": f"01-02-{row['uid']:06}"} for row in make_rows(200)
    ]
    rule = {"type": "time", "column": "day", "boundaries": ["01-02-000100", "01-02-000150"]}
    log = write_csv(rows, tmp_path / "log.csv")
    schema = prepare([str(log)], tmp_path / "out", spec_with(together="user", split=rule))
    splits = {name: read_split(tmp_path / "out", schema, name) for name in schema.splits}
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [100, 50, 50]
    groups = {int(hashlib.md5(row["user"].encode()).hexdigest()[:15], 16) for row in rows}
    assert {row[GROUP_COLUMN] for split in splits.values() for row in split} == groups


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
        ("labels: [a", "not YAML"),
        ("- a", "must be a mapping"),
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


STOPPED_BY = """
import os, signal, sys, time
import tools.prepare_data as tool
from ssr_rec.data.preparation import prepare as module
def stopped(plan):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(60)  # another thread of the process may take the signal, so that it comes a little later
module.count_splits = stopped
for number in (signal.SIGINT, signal.SIGTERM):  # what a script starts in the background begins with SIGINT ignored
    signal.signal(number, signal.default_int_handler)
sys.exit(tool.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_stopped_or_killed_it_leaves_nothing_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_csv(make_rows(300), tmp_path / "log.csv")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec_with().model_dump(mode="json")))
    output = tmp_path / "out" / "data"
    command = ["table", "--spec", str(tmp_path / "spec.yaml"), "--input", str(log), "--output", str(output)]

    def ended_by(name: str) -> subprocess.CompletedProcess:
        command_line = [sys.executable, "-c", STOPPED_BY, name, *command]
        return subprocess.run(command_line, cwd=ROOT, check=False, capture_output=True, text=True)

    for name in ("SIGTERM", "SIGINT"):
        ended = ended_by(name)
        assert ended.returncode == 130 and "Traceback" not in ended.stderr
        assert ended.stderr.splitlines()[-1] == f"stopped: {output} is as it was before; the same command starts anew"
        assert list(output.parent.iterdir()) == []
    assert ended_by("SIGKILL").returncode == -signal.SIGKILL
    (left,) = output.parent.iterdir()
    (output.parent / ".data.mine").mkdir()
    held = output.parent / ".data.abcdefgh"
    held.mkdir()
    handle = os.open(held, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as a preparation that goes on has it
    monkeypatch.setattr(shards, "YOUNG_S", -1.0)
    with shards.new_folder(output):
        pass
    os.close(handle)
    assert not left.exists()
    assert sorted(path.name for path in output.parent.iterdir()) == [".data.abcdefgh", ".data.mine", "data"]


def test_what_no_file_is_to_blame_for_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_csv(make_rows(300), tmp_path / "log.csv")

    def full(plan: Any) -> Any:
        raise duckdb.IOException("Could not write: No space left on device\nand more")

    monkeypatch.setattr("ssr_rec.data.preparation.prepare.count_splits", full)
    with pytest.raises(ValueError, match=r"log\.csv: DuckDB: .*No space left on device$"):
        prepare([str(log)], tmp_path / "out", spec_with())
    assert not list(tmp_path.glob(".out*"))
