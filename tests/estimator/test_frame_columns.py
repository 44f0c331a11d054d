"""What kind each column of a frame is guessed to be, and the log that is written of it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation import frame_columns
from ssr_rec.data.preparation.frame_columns import spec_of_frame, write_frame
from ssr_rec.estimator.labels import labels_of
from ssr_rec.estimator.rows import split_of

ROWS = 200
NUMBERS = np.arange(ROWS)
GUESSED: dict[str, tuple[Any, str]] = {
    "user_id": (NUMBERS, "categorical"),
    "age": (NUMBERS % 7, "categorical"),
    "age_with_gaps": (np.where(NUMBERS % 5, NUMBERS % 7, np.nan), "categorical"),
    "views": (NUMBERS * 3, "numeric"),
    "price": (NUMBERS / 3, "numeric"),
    "whole_price": (NUMBERS % 4 * 1.0, "numeric"),
    "city": (["Ulm", "Köln", None, "Bonn"] * 50, "categorical"),
    "is_new": (NUMBERS % 2 == 0, "categorical"),
    "kind": (pd.Categorical(["a", "b"] * 100), "categorical"),
    "day": ([datetime.date(2026, 11, 1 + n % 9) for n in NUMBERS], "categorical"),
    "request": ([f"r{n}" for n in NUMBERS], "ignore"),
    "moment": (pd.Timestamp("2026-11-01") + pd.to_timedelta(NUMBERS, unit="h"), "ignore"),
    "nothing": ([None] * ROWS, "ignore"),
    "tags": ([[1, 2], None, [], [3]] * 50, "lists"),
    "words": ([("a", "b"), ("c",)] * 100, "lists"),
    "weights": ([[0.5, 1.5]] * ROWS, "ignore"),
    "thing": ([object()] * ROWS, "ignore"),
}


@pytest.mark.parametrize("name", GUESSED)
def test_a_column_is_guessed_by_its_values(name: str) -> None:
    values, kind = GUESSED[name]
    frame = pd.DataFrame({name: values, "other": NUMBERS / 7})
    found = spec_of_frame(frame, {"labels": ["click"]})
    assert name in getattr(found.spec, kind)
    assert name in found.reasons and f"{name}*" in found.summary()


@pytest.mark.parametrize("name", ["user_id", "age", "price", "city", "request", "is_new"])
def test_a_column_of_groups_is_no_feature_unless_it_is_named_as_one(name: str) -> None:
    frame = pd.DataFrame({name: GUESSED[name][0], "other": NUMBERS / 7})
    found = spec_of_frame(frame, {"labels": ["click"], "together": name})
    assert found.spec.features == ["other"] and name not in found.reasons
    assert f"together     {name}" in found.summary().splitlines()
    found.spec.check_columns([*frame.columns, "click"], "frame")
    named = spec_of_frame(frame, {"labels": ["click"], "together": name, "categorical": [name]})
    assert named.spec.features == [name, "other"] and "together" not in named.summary()
    users = spec_of_frame(frame, {"labels": ["click"], "group_id": "user_id"})
    assert ("user_id" in users.spec.features) == (name == "user_id")


def test_what_is_named_is_not_guessed() -> None:
    frame = pd.DataFrame({name: values for name, (values, _) in GUESSED.items()})
    entries = {"labels": ["click"], "numeric": ["age"], "lists": ["tags"], "ignore": ["city", "thing"]}
    found = spec_of_frame(frame, {**entries, "group_id": "user_id", "split": {"type": "time", "column": "moment"} | R})
    assert found.spec.numeric[0] == "age" and found.spec.lists["tags"].max_length == 2
    assert "moment" not in found.reasons and not {"age", "tags", "city"} & set(found.reasons)
    found.spec.check_columns([*frame.columns, "click"], "frame")  # no column is left without a role
    raw = spec_of_frame(frame, {"labels": ["click"], "dense": ["price", "views"]})
    assert raw.spec.dense == {"price": "standard", "views": "standard"} and "price" not in raw.reasons
    vectors = spec_of_frame(frame, {"labels": ["click"], "row_vectors": {"weights": 2}})
    assert vectors.spec.row_vectors == {"weights": 2} and "weights" not in vectors.reasons
    with pytest.raises(UserError, match="dense: no column 'prices', did you mean 'price'"):
        spec_of_frame(frame, {"labels": ["click"], "dense": ["prices"]})


R = {"ratios": [8, 1, 1]}


def test_rows_of_a_group_are_not_divided_between_training_and_validation() -> None:
    frame = pd.DataFrame({name: GUESSED[name][0] for name in ("request", "age", "price")})
    labels, spec = labels_of(frame, pd.Series(NUMBERS % 2, name="click"), None), {"together": "request"}
    assert split_of(labels, None, spec, 0) is None and split_of(labels, None, {}, 0) is not None
    assert not split_of(labels, (frame, frame), spec, 0).any()
    for validation in (0.2, frame, [frame]):
        with pytest.raises(UserError, match="divide the groups of together='request' row by row; give two frames"):
            split_of(labels, validation, spec, 0)
    assert "request" not in spec_of_frame(frame, {"labels": ["click"], **spec}).reasons


def test_a_frame_is_written_in_parts_and_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_columns, "ROWS_AT_ONCE", 64)
    names = [name for name, (_, kind) in GUESSED.items() if kind != "ignore"]
    frame = pd.DataFrame({name: GUESSED[name][0] for name in names}, index=NUMBERS[::-1])
    write_frame(frame, tmp_path / "rows.parquet", {"click": (NUMBERS % 2).astype(np.int8)})
    found = pq.read_table(tmp_path / "rows.parquet")
    assert found.column_names == [*names, "click"] and found["click"].to_pylist() == (NUMBERS % 2).tolist()
    for name in ("user_id", "price", "city", "kind", "day"):
        assert found[name].to_pylist() == [None if pd.isna(one) else one for one in frame[name]]
    assert found["words"].to_pylist() == [list(one) for one in frame["words"]]


def test_a_column_of_several_types_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mixed.*give its values one type"):
        write_frame(pd.DataFrame({"mixed": ["a", 1, [2]]}), tmp_path / "rows.parquet", {})


def test_labels_that_the_frame_has_a_column_of_are_refused() -> None:
    X = pd.DataFrame({"a": [1, 2, 3], "click": [0, 1, 0]})
    for y in (1 - X["click"], 1 - X[["click"]]):
        with pytest.raises(UserError, match=r"y and the frame both have a column 'click'; drop it from the frame"):
            labels_of(X, y, None)
    assert labels_of(X, 1 - X["click"], None, [np.array([0, 1])]).names == ["click"]
    assert labels_of(X.drop(columns="click"), X["click"], None).names == ["click"]
