"""A split by days against plain loops over the rows."""

import datetime
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.schema import Schema
from tests.cases import one_quick
from tests.prepare_log import make_rows, md5_id, read_split, spec_with, write_csv, write_parquet
from tools.prepare_data import main


def prepared(tmp_path: Path, path: Path, name: str = "out", fit_days: int = 2) -> tuple[Schema, dict]:
    spec = spec_with(split={"type": "days", "column": "day", "fit_days": fit_days})
    schema = prepare([str(path)], tmp_path / name, spec)
    assert Schema.read(tmp_path / name) == schema
    assert schema.days is not None
    return schema, {day: read_split(tmp_path / name, schema, day) for day in schema.days.names}


def as_date(text: str) -> datetime.date:
    return datetime.date.fromisoformat(text)


def as_moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(f"{text}T{int(text[-2:]):02d}:59:59")


KINDS = {"text": str, "dates": as_date, "moments": as_moment, "numbers": lambda text: int(text[-2:])}


@pytest.mark.parametrize("kind", one_quick("moments", *(kind for kind in KINDS if kind != "moments")))
def test_every_day_is_a_split_in_order_of_time(tmp_path, kind):
    rows = make_rows(1000)
    day_of = {md5_id(row["uid"], 2**30): row["day"] for row in rows}
    stored = [{**row, "day": KINDS[kind](row["day"])} for row in reversed(rows)]  # not in order of time
    schema, splits = prepared(tmp_path, write_parquet(stored, tmp_path / "log.parquet"))
    days = sorted({row["day"] for row in rows})
    # As numbers, 10 comes after 9.
    assert schema.days.names == ([str(int(day[-2:])) for day in days] if kind == "numbers" else days)
    assert len(days) == 20
    for name, day in zip(schema.days.names, days, strict=True):
        assert sorted(row["uid"] for row in splits[name]) == sorted(u for u, d in day_of.items() if d == day)
        assert [shard.path.startswith(f"days/{name}/") for shard in schema.splits[name].shards] == [True]


def test_numbers_in_text_files_are_days_in_order_of_number(tmp_path):
    rows = [{**row, "day": int(row["day"][-2:])} for row in make_rows(400)]
    schema, _ = prepared(tmp_path, write_csv(rows, tmp_path / "log.csv"))
    assert schema.days.names == [str(number) for number in range(1, 21)]


def test_nothing_of_later_days_is_in_the_encodings(tmp_path):
    rows = make_rows(3000)
    days = sorted({row["day"] for row in rows})
    path = write_parquet(rows, tmp_path / "log.parquet")
    schema, splits = prepared(tmp_path, path, fit_days=3)
    assert schema.days.fitted == 3
    seen = Counter(row["city"] for row in rows if row["day"] in days[:3] and row["city"] is not None)
    wanted = {city: count for city, count in seen.items() if count >= 3}
    vocabulary = pq.read_table(tmp_path / "out" / "vocabularies" / "city.parquet").to_pydict()
    assert dict(zip(vocabulary["value"], vocabulary["count"], strict=True)) == wanted
    ids = dict(zip(vocabulary["value"], vocabulary["id"], strict=True))
    by_hash = {md5_id(row["uid"], 2**30): row for row in rows}
    unseen = 0
    for day in days:
        for row in splits[day]:
            city = by_hash[row["uid"]]["city"]
            assert row["city"] == (0 if city is None else ids.get(city, 1))
            unseen += row["city"] == 1
    assert unseen > 100
    # Later days could be anything.
    changed = [{**row, "city": "new", "price": 1e9} if row["day"] > days[2] else row for row in rows]
    same, after = prepared(tmp_path, write_parquet(changed, tmp_path / "changed.parquet"), "changed", fit_days=3)
    assert same.features == schema.features
    for day in days[:3]:
        assert after[day] == splits[day]
    assert {row["city"] for row in after[days[5]]} == {1}


@pytest.mark.parametrize(
    ("changes", "fit_days", "message"),
    [
        ({"day": "2024/05/06"}, 1, "'2024/05/06', which names no day; cut it to days"),
        ({"day": ".."}, 1, "'..', which names no day"),
        ({"day": None}, 1, "column 'day' is missing; the time of the split must not be missing"),
        ({}, 20, "20 days and the encodings are fitted on 20: none is left to evaluate; lower --fit-days"),
    ],
)
def test_what_is_no_split_by_days_is_refused(tmp_path, changes, fit_days, message):
    rows = make_rows(400)
    rows[7] |= changes
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("..", r"\.\.")):
        prepared(tmp_path, write_parquet(rows, tmp_path / "log.parquet"), fit_days=fit_days)
    assert not (tmp_path / "out").exists()


def test_moments_as_days_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("ssr_rec.data.preparation.split.MAX_DAYS", 19)
    with pytest.raises(ValueError, match="column 'day' has more than 19 distinct values"):
        prepared(tmp_path, write_parquet(make_rows(400), tmp_path / "log.parquet"))


def test_the_command_line_splits_by_days(tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: toy, labels: [click], categorical: [user], ignore: [city, price, day, tags, uid]}")
    log = write_parquet(make_rows(400), tmp_path / "log.parquet")
    command = ["table", "--spec", str(spec), "--input", str(log)]
    assert main([*command, "--output", str(tmp_path / "a"), "--days", "day", "--fit-days", "4"]) == 0
    assert Schema.read(tmp_path / "a").days.fitted == 4
    assert main([*command, "--output", str(tmp_path / "b"), "--days", "day"]) == 0
    assert Schema.read(tmp_path / "b").days.fitted == 1
    capsys.readouterr()
    for wrong, message in (
        (["--fit-days", "2"], "--fit-days needs --days"),
        (["--days", "day", "--ratios", "8", "1", "1"], "are not for it"),
        (["--days", "when"], "no column 'when'"),
    ):
        assert main([*command, "--output", str(tmp_path / "c"), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_schema_whose_days_are_not_its_splits_is_refused(tmp_path):
    schema, _ = prepared(tmp_path, write_parquet(make_rows(400), tmp_path / "log.parquet"))
    for days in ({"names": schema.days.names[1:], "fitted": 1}, {"names": schema.days.names, "fitted": 20}):
        with pytest.raises(ValueError, match="days: its names must be the splits"):
            Schema.model_validate({**schema.model_dump(), "days": days})


def test_a_dataset_without_days_is_written_as_before_there_were_any(tmp_path):
    prepare([str(write_parquet(make_rows(400), tmp_path / "log.parquet"))], tmp_path / "out", spec_with())
    assert '"days"' not in (tmp_path / "out" / "schema.json").read_text()
    assert Schema.read(tmp_path / "out").days is None
