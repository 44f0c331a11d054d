"""Histories made from the log, against plain loops over random logs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ssr_rec.data.features import LogBuckets
from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.preparation.where import parse_where
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.serving.export import export_run
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.scorer import load
from tests.cases import one_quick
from tests.histories import GIVEN, LENGTH, SPEC, decoded, given_log, random_log, raw, write
from tests.made_run import make_run


def expected(log: pd.DataFrame, row: Any, length: int, only_clicks: bool) -> pd.DataFrame:
    events = log[(log.user == row.user) & (log.time < row.time)]
    if only_clicks:
        events = events[events.click == 1]
    return events.sort_values(["time", "row"], kind="stable").tail(length)


def prepared(log: pd.DataFrame, folder: Path, files: int = 1) -> Path:
    prepare(write(log, folder / "log", files), folder / "data", make_spec(SPEC, "spec"))
    return folder / "data"


@pytest.mark.parametrize(("seed", "files"), [pytest.param(0, 1, marks=pytest.mark.slow), (1, 3)])
def test_histories_are_those_of_a_plain_loop(tmp_path: Path, seed: int, files: int) -> None:
    log = random_log(seed)
    folder = prepared(log, tmp_path, files)
    schema = Schema.read(folder)
    features = {feature.name: feature for feature in schema.features}
    assert [(s.name, s.features, s.age) for s in schema.sequences] == [
        ("clicked", ["clicked_item", "clicked_price", "clicked_kind", "clicked_age"], "clicked_age"),
        ("seen", ["seen_item"], None),
    ]
    assert features["clicked_item"].table == features["item"].table == features["seen_item"].table == "item"
    items, kinds = raw(features["item"].encoding, folder), raw(features["kind"].encoding, folder)
    ages = features["clicked_age"].encoding
    assert isinstance(ages, LogBuckets) and ages.low == 0.0
    longest, checked = 0, 0
    for number, line in decoded(folder).items():
        row = log.iloc[number]
        clicks = expected(log, row, LENGTH, True)
        assert [int(items[i]) for i in line["clicked_item"]] == clicks.item.tolist()
        assert [kinds[i] for i in line["clicked_kind"]] == clicks.kind.tolist()
        places = [
            min(math.floor(math.log1p(row.time - time) / (ages.high / 16)), 15) + 1 for time in clicks.time.tolist()
        ]
        assert line["clicked_age"] == places
        assert len(line["clicked_price"]) == len(places)
        assert [int(items[i]) for i in line["seen_item"]] == expected(log, row, 2, False).item.tolist()
        longest, checked = max(longest, len(places)), checked + 1
    assert longest == LENGTH and checked == len(log)


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (5, 6))])
def test_nothing_at_or_after_a_row_changes_its_history(tmp_path: Path, seed: int) -> None:
    log, moment = random_log(seed), 20
    late = np.flatnonzero(log.time >= moment)
    changed = log.copy()
    rng = np.random.default_rng(9)
    for column in ("item", "kind", "price", "click", "user", "time"):
        changed.loc[late, column] = rng.permutation(log.loc[late, column].to_numpy())
    changed.loc[late, "item"] += rng.integers(0, 2, len(late)) * 100
    # Fitted before the moment, so that the same events have the same ids.
    spec = make_spec({**SPEC, "split": {"type": "time", "column": "time", "boundaries": [18, 30]}}, "spec")
    found = []
    for name, one, files in (("a", log, 3), ("b", changed, 2)):
        prepare(write(one, tmp_path / name, files), tmp_path / f"{name}.data", spec)
        found.append(decoded(tmp_path / f"{name}.data"))
    compared = 0
    for number, (before, after) in {n: (found[0][n], found[1][n]) for n in found[0]}.items():
        # Rows at the moment itself may be other ones now, and still have the past of their user.
        if max(log.time[number], changed.time[number]) <= moment and log.user[number] == changed.user[number]:
            for name in ("clicked_item", "clicked_kind", "clicked_price", "clicked_age", "seen_item"):
                assert before[name] == after[name], (number, name)
                compared += len(before[name])
    assert compared > 600


MOMENTS: dict[str, Any] = {
    "parts of seconds": lambda n: pd.Timestamp("2026-03-01") + pd.to_timedelta(n * 0.3, unit="s"),
    "before 1970": lambda n: pd.Timestamp("1969-12-31 23:59:55") + pd.to_timedelta(n * 0.3, unit="s"),
    "beyond a float": lambda n: 1_700_000_000_000_000_000 + n * 7,
    "dates": lambda n: (pd.Timestamp("2026-03-01") + pd.to_timedelta(n, unit="D")).dt.date,
    "text": lambda n: n.map("m{:03d}".format),
}


@pytest.mark.parametrize(
    "kind", one_quick("parts of seconds", *(kind for kind in MOMENTS if kind != "parts of seconds"))
)
def test_times_of_every_kind_have_their_order_and_ages(tmp_path: Path, kind: str) -> None:
    log = random_log(7)
    log["time"] = MOMENTS[kind](log.time)
    spec = json.loads(json.dumps(SPEC))
    spec["sequences"]["clicked"]["from_log"]["age"] = kind != "text"
    schema = prepare(write(log, tmp_path / "log", 2), tmp_path / "data", make_spec(spec, "spec"))
    features = {feature.name: feature for feature in schema.features}
    items = raw(features["item"].encoding, tmp_path / "data")
    for number, line in decoded(tmp_path / "data").items():
        clicks = expected(log, log.iloc[number], LENGTH, True)
        assert [int(items[i]) for i in line["clicked_item"]] == clicks.item.tolist()
        if kind == "text":
            continue
        ages = [log.time[number] - time for time in clicks.time]
        seconds = [age.total_seconds() if hasattr(age, "total_seconds") else float(age) for age in ages]
        width = features["clicked_age"].encoding.high / 16
        assert line["clicked_age"] == [min(math.floor(math.log(1 + s) / width), 15) + 1 for s in seconds]


def rows_with_histories(log: pd.DataFrame, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The log's rows as one gives them to be scored: each with its user's earlier events."""
    rows = []
    for number in numbers:
        row = log.iloc[number]
        clicks, seen = expected(log, row, LENGTH, True), expected(log, row, 2, False)
        history = {f"clicked_{c}": clicks[c].tolist() for c in ("item", "price", "kind")}
        history |= {"clicked_age": (row.time - clicks.time).tolist(), "seen_item": seen.item.tolist()}
        rows.append({**row.to_dict(), **history})
    return rows


def test_raw_rows_are_encoded_as_the_preparation_does(tmp_path: Path) -> None:
    log = random_log(3)
    folder = prepared(log, tmp_path)
    schema = Schema.read(folder)
    lines = decoded(folder)
    rows = rows_with_histories(log, lines)
    encoder = Encoder(schema, folder)
    lists = encoder.encode(rows).lists
    names = [feature.name for feature in schema.features if feature.kind == "list"]
    for name, (values, offsets) in zip(names, lists, strict=True):
        wanted = [line[name] for line in lines.values()]
        assert [values[a:b].tolist() for a, b in pairwise(offsets)] == wanted, name
    rows[5]["clicked_age"] = [1.0, *rows[5]["clicked_age"]]
    with pytest.raises(ValueError, match="row 5: sequence 'clicked': 'clicked_item' has"):
        encoder.encode(rows)


@pytest.mark.slow
def test_raw_rows_have_the_scores_of_the_prepared_ones_to_the_bit(tmp_path: Path) -> None:
    clicked = {"name": "hstu", "dim": 16, "num_heads": 2, "bias": "position_age"}
    seen = {"name": "target_attention"}
    log = random_log(3)
    folder = prepared(log, tmp_path)
    encoders = {"clicked": {"encoder": clicked}, "seen": {"encoder": seen}}
    small = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=8"]
    wanted = [*small, f"--sequences={json.dumps(encoders)}"]
    export_run(make_run(tmp_path / "run", folder, wanted), tmp_path / "artifact")
    scorer = load(tmp_path / "artifact")
    batches = Reader(folder, Schema.read(folder), "train", batch_size=64, num_lanes=1).epoch(0)
    for batch in batches:
        found = scorer.predict(rows_with_histories(log, batch.group_ids.tolist()))["click"]
        assert np.array_equal(found, scorer.score(batch.sparse).sigmoid()[:, 0].numpy()) and np.ptp(found) > 0.01


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("clck = 1", "no column 'clck', did you mean 'click'"),
        ("click == 1", "where: 'click == 1' is no comparison such as"),
        ("kind > 'a'", "text is compared by = and != alone"),
        ("click = 1; drop table x", "is no comparison"),
        ("click = 1 and", "is no comparison"),
        ("click = '1'", "'click' holds float64, which is not compared with the text '1'; numbers stand without quotes"),
    ],
)
def test_a_bad_condition_is_refused(tmp_path: Path, where: str, message: str) -> None:
    spec = json.loads(json.dumps(SPEC))
    spec["sequences"]["clicked"]["from_log"]["where"] = where
    with pytest.raises(ValueError, match=message):
        prepare(write(random_log(0), tmp_path / "log", 1), tmp_path / "data", make_spec(spec, "spec"))


def test_a_row_without_user_or_time_is_refused(tmp_path: Path) -> None:
    for column, spec in (("user", SPEC), ("time", {**SPEC, "numeric": ["price", "time"]})):
        log = random_log(0).astype({column: object})
        log.at[17, column] = None
        log[column] = log[column].astype("float64" if column == "time" else object)
        with pytest.raises(
            ValueError, match=rf"row 18: column '{column}' is missing; .*'clicked' go by it, so it must"
        ):
            prepare(write(log, tmp_path / column, 1), tmp_path / "data", make_spec(spec, "spec"))


def test_times_of_two_kinds_are_refused(tmp_path: Path) -> None:
    log = random_log(0)
    inputs = write(log, tmp_path / "log", 2)
    late = log.iloc[120:].assign(time=log.time.map("2026-03-{:02d}".format))
    late.to_parquet(inputs[1], index=False)
    with pytest.raises(ValueError, match=r"'time' holds int64 in .*0.parquet and string in .*no common order"):
        prepare(inputs, tmp_path / "data", make_spec(SPEC, "spec"))
    log = log.astype({"time": float})
    log.loc[9, "time"] = math.inf
    with pytest.raises(ValueError, match=r"row 10: column 'time' is inf; .*must not be missing or infinite"):
        prepare(write(log, tmp_path / "inf", 1), tmp_path / "data", make_spec(SPEC, "spec"))


def test_a_condition_is_read_from_the_left() -> None:
    found = parse_where("""kind != 'rock and roll' AND "a b" >= -1.5e3 and click=1""")
    assert [(one.column, one.sign, one.value) for one in found] == [
        ("kind", "!=", "rock and roll"),
        ("a b", ">=", -1500.0),
        ("click", "=", 1),
    ]


@pytest.mark.slow
def test_histories_go_on_across_days(tmp_path: Path) -> None:
    """Each day is a split; the events of the days before belong to its rows' histories as those of one log do."""
    log = random_log(3)
    log["day"] = log.time // 8
    spec = {**SPEC, "split": {"type": "days", "column": "day"}}
    schema = prepare(write(log, tmp_path / "log", 2), tmp_path / "data", make_spec(spec, "spec"))
    items = raw({f.name: f for f in schema.features}["item"].encoding, tmp_path / "data")
    earlier = 0
    for number, line in decoded(tmp_path / "data").items():
        clicks = expected(log, log.iloc[number], LENGTH, True)
        known = {int(value) for value in items.values()}
        wanted = [item if item in known else None for item in clicks.item.tolist()]
        assert [int(items[i]) if i in items else None for i in line["clicked_item"]] == wanted
        earlier += int((clicks.day < log.day[number]).sum())
    assert earlier > 100


def test_days_are_not_added_to_histories(tmp_path: Path) -> None:
    log = random_log(0)
    log["time"] //= 10
    spec = {**SPEC, "split": {"type": "days", "column": "time"}}
    prepare(write(log[log.time < 3], tmp_path / "log", 1), tmp_path / "data", make_spec(spec, "spec"))
    with pytest.raises(
        ValueError,
        match=r"sequence 'clicked' is made from the log, .* prepare the whole log again",
    ):
        add(write(log[log.time == 3], tmp_path / "more", 1), tmp_path / "data")


def test_two_columns_of_one_name_are_refused() -> None:
    spec = json.loads(json.dumps(SPEC))
    spec["sequences"]["clicked"]["from_log"]["columns"] = ["item", "age"]
    with pytest.raises(ValueError, match="the column 'age' and age: true would make one feature"):
        make_spec(spec, "spec")
    spec["sequences"]["clicked"]["from_log"]["columns"] = ["item", "item"]
    with pytest.raises(ValueError, match="columns names 'item' twice"):
        make_spec(spec, "spec")


@pytest.mark.slow
@pytest.mark.spark
def test_spark_makes_the_same_bytes(tmp_path: Path) -> None:
    from ssr_rec.data.preparation.engines import EngineSettings, SparkSettings

    timed = random_log(4)
    # Finer than the microseconds that Spark keeps, and on the hour that some time zones skip.
    moments = 1_774_740_600_000_000_000 + timed.time * 977_623_000_700
    timed["time"] = pd.to_datetime(moments)
    spark = EngineSettings(spark=SparkSettings(master="local[2]"))
    for name, log, entries in (("made", timed, SPEC), ("given", given_log(), GIVEN)):
        folder = tmp_path / name
        inputs = write(log, folder / "log", 2)
        spec = make_spec({**entries, "min_count": 2}, "spec")
        first, second = prepare(inputs, folder / "duck", spec), prepare(inputs, folder / "spark", spec, settings=spark)
        assert first.dataset_id == second.dataset_id
        for split in first.splits:
            for mine, theirs in zip(first.splits[split].shards, second.splits[split].shards, strict=True):
                assert (folder / "duck" / mine.path).read_bytes() == (folder / "spark" / theirs.path).read_bytes()
