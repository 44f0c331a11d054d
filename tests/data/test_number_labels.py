"""Labels that are numbers: from the spec to the batch, scales against NumPy, both engines, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.cases import one_quick
from tests.conftest import reseal
from tests.data.test_row_weights import TIME, weighted_rows
from tests.prepare_log import Row, md5_id, run, spec_with, write_csv, write_parquet
from tests.shard_edits import replace, rewrite

TASKS = {"watch_s": {"kind": "number", "where": "click = 1"}, "rating": {"kind": "number", "missing": True}}
SPEC: dict[str, Any] = {
    "labels": ["click", "watch_s", "rating"], "ignore": ["pay", "like", "w"], "split": TIME, "tasks": TASKS,
}  # fmt: skip


def watched(count: int = 400) -> list[Row]:
    rng = np.random.default_rng(5)
    rows = weighted_rows(count)
    for row in rows:
        row["watch_s"] = float(np.round(np.exp(rng.normal(3, 1)), 3)) if row["click"] else None
        row["rating"] = rng.choice([None, -1.5, 0.0, 3.25])
    return rows


@pytest.mark.parametrize("kind", one_quick("parquet", "csv"))
def test_a_number_is_stored_as_it_is_and_scaled_by_training_rows(tmp_path: Path, kind: str) -> None:
    rows = watched()
    write = write_csv if kind == "csv" else write_parquet
    schema, found = run(tmp_path, [write(rows, tmp_path / f"log.{kind}")], spec_with(**SPEC))
    assert schema.missing_labels == schema.number_names == ["watch_s", "rating"]
    assert set(schema.splits["train"].positive_rate) == {"click"}
    by_id = {md5_id(row["uid"], 2**30): row for row in rows}
    train = []
    for split, stored in found.items():
        for got in stored:
            row = by_id[got["uid"]]
            wanted = row["watch_s"] if row["click"] == 1 else None
            assert got["watch_s"] == (None if wanted is None else float(np.float32(wanted)))
            assert got["rating"] == row["rating"] and got["click"] == row["click"]
            if split == "train" and wanted is not None:
                train.append(np.float32(wanted))
    assert schema.splits["train"].counted["watch_s"] == len(train)
    number, rating = schema.numbers
    seconds = np.array(train, dtype=np.float64)
    every = np.array([row["watch_s"] for row in rows if row["click"] == 1], dtype=np.float32)
    assert (number.mean, number.std) == pytest.approx((seconds.mean(), seconds.std()), rel=1e-12)
    logs = np.log1p(seconds)
    assert (number.log_mean, number.log_std) == pytest.approx((logs.mean(), logs.std()), rel=1e-12)
    assert (number.low, number.high) == (every.min(), every.max())
    assert (rating.low, rating.log_mean, rating.log_std) == (-1.5, None, None)
    for batch in Reader(tmp_path / "out", schema, "train", 64, num_lanes=2).epoch(0):
        assert batch.weights is not None and bool(batch.labels.isfinite().all())
        uids = batch.sparse["uid"].values().tolist()
        for uid, labels, weights in zip(uids, batch.labels.tolist(), batch.weights.tolist(), strict=True):
            row = by_id[uid]
            clicked, rated = row["click"] == 1, row["rating"] is not None
            assert weights == [1, clicked, rated]
            assert labels == [row["click"], np.float32(row["watch_s"]) if clicked else 0, row["rating"] or 0]
    assert schema.select(None, ["rating"]).number_names == ["rating"]


def test_kinds_that_are_binary_leave_the_dataset_as_it_was(tmp_path: Path) -> None:
    rows = weighted_rows()
    plain = {**SPEC, "labels": ["click", "like"], "ignore": ["pay", "w"], "tasks": {"like": {"missing": True}}}
    said = {**plain, "tasks": {"like": {"missing": True, "kind": "binary"}}}
    log = [write_parquet(rows, tmp_path / "log.parquet")]
    for name, spec in (("plain", plain), ("said", said)):
        run(tmp_path, log, spec_with(**spec), name)
    one, other = ((tmp_path / name / "schema.json").read_bytes() for name in ("plain", "said"))
    assert one == other and not {"numbers", "kind"} & {
        *json.loads(one),
        *json.loads(one)["preparation"]["tasks"]["like"],
    }


BAD = {
    "nan": (
        {"click": 1, "watch_s": math.nan},
        r"log\.parquet: row 42: column 'watch_s' is (nan|missing); .* at most 3.4e.38 where click = 1",
    ),
    "infinite": ({"rating": math.inf}, "row 42: column 'rating' is inf; a label of kind number must be finite"),
    "large": ({"rating": -1e39}, r"row 42: column 'rating' is -1e\+39; a label of kind number must be finite"),
    "null": ({"click": 1, "watch_s": None}, "row 42: column 'watch_s' is missing; .* at most 3.4e.38 where click = 1"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_odd_numbers_are_refused_by_row(tmp_path: Path, kind: str) -> None:
    changes, message = BAD[kind]
    rows = watched(200)
    rows[41] |= changes
    with pytest.raises(UserError, match=message):
        run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(**SPEC))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_nan_was_not_observed_as_a_null(tmp_path: Path) -> None:
    rows = watched(200)
    nans = [row | {"rating": math.nan if row["rating"] is None else row["rating"]} for row in rows]
    found = [
        run(tmp_path, [write_parquet(log, tmp_path / f"{name}.parquet")], spec_with(**SPEC), name)[1]
        for name, log in (("null", rows), ("nan", nans))
    ]
    assert found[0] == found[1] and None in [row["rating"] for row in found[1]["train"]]


def test_a_number_that_is_always_the_same_has_deviations_of_1(tmp_path: Path) -> None:
    rows = [{**row, "rating": 0.8} for row in watched(200)]
    schema, _ = run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(**SPEC))
    logs = np.full(schema.splits["train"].num_rows, np.log1p(np.float64(np.float32(0.8))))
    rating = schema.numbers[1]
    assert (rating.std, rating.log_std) == (1, 1) and rating.log_mean == pytest.approx(logs.mean())


def test_text_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "rating": "good"} for row in watched(50)]
    with pytest.raises(UserError, match="column 'rating' holds string, not numbers"):
        run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(**SPEC))
    with pytest.raises(UserError, match=r"log\.csv: row 1 .*good'\): column 'rating' must be a number"):
        run(tmp_path, [write_csv(rows, tmp_path / "log.csv")], spec_with(**SPEC))


def test_negatives_of_a_number_are_refused() -> None:
    only = {"labels": ["watch_s"], "ignore": ["pay", "like", "w", "click", "rating"], "negatives": 0.5}
    with pytest.raises(UserError, match=r"negatives=0\.5: label 'watch_s' is a number"):
        spec_with(**{**SPEC, **only, "tasks": {"watch_s": {"kind": "number"}}})
    with pytest.raises(UserError, match=r"tasks\.watch_s: it says nothing; give where, missing: true or kind: number"):
        spec_with(**{**SPEC, "tasks": {"watch_s": {"kind": "binary"}}})


def test_a_shard_with_an_odd_number_is_refused(tmp_path: Path) -> None:
    schema, _ = run(tmp_path, [write_parquet(watched(), tmp_path / "log.parquet")], spec_with(**SPEC))
    folder = tmp_path / "out"

    def change(table):
        values = table["rating"].to_pylist()
        values[100] = math.inf
        return replace(table, "rating", values)

    rewrite(folder, change)
    split = schema.splits["train"]
    shard = split.shards[0].model_copy(update={"group_rows": 64})
    splits = {**schema.splits, "train": split.model_copy(update={"shards": [shard]})}
    schema.model_copy(update={"splits": splits}).write(folder)
    reseal(folder)
    with pytest.raises(UserError, match="label 'rating' is inf in row 100, must be finite; prepare the log again"):
        list(Reader(folder, Schema.read(folder), "train", 64, num_lanes=2).epoch(0))


@pytest.mark.slow
def test_added_days_widen_the_range_and_leave_the_scales(tmp_path: Path) -> None:
    rows = watched(600)
    days = sorted({row["day"] for row in rows})
    for row in rows:
        if row["day"] == days[-1] and row["rating"] is not None:
            row["rating"] = -7.5
    by_days = {**SPEC, "split": {"type": "days", "column": "day", "fit_days": 3}}
    first, last = ([row for row in rows if (row["day"] == days[-1]) == late] for late in (False, True))
    made = prepare([str(write_parquet(first, tmp_path / "a.parquet"))], tmp_path / "grown", spec_with(**by_days))
    add([str(write_parquet(last, tmp_path / "b.parquet"))], tmp_path / "grown")
    grown = Schema.read(tmp_path / "grown")
    whole = prepare([str(write_parquet(rows, tmp_path / "c.parquet"))], tmp_path / "whole", spec_with(**by_days))
    assert grown.numbers == whole.numbers and grown.numbers[1].low == -7.5 and made.numbers[1].low == -1.5
    assert grown.splits[days[-1]].counted == whole.splits[days[-1]].counted
