"""Weights of rows, missing labels and tasks that ask of some rows: from the spec to the batch, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import NOT_OBSERVED, WEIGHT_COLUMN, Schema
from tests.cases import one_quick
from tests.conftest import reseal
from tests.prepare_log import Row, make_rows, md5_id, run, spec_with, write_csv, write_parquet
from tests.shard_edits import replace, rewrite

TIME = {"type": "time", "column": "day", "boundaries": ["2024-01-12", "2024-01-16"]}
TASKS = {"pay": {"where": "click = 1 and price >= 0"}, "like": {"missing": True}}
SPEC: dict[str, Any] = {"labels": ["click", "pay", "like"], "split": TIME, "weight": "w", "tasks": TASKS}


def weighted_rows(count: int = 600) -> list[Row]:
    rng = np.random.default_rng(3)
    rows = make_rows(count)
    for row in rows:
        row["w"] = float(rng.choice([0, 0.25, 1, 3]))
        row["pay"] = int(rng.random() < 0.3) if row["click"] else None
        row["like"] = rng.choice([None, 0, 1])
    return rows


@pytest.mark.parametrize("kind", one_quick("parquet", "csv"))
def test_the_batch_has_weights_and_masks(tmp_path: Path, kind: str) -> None:
    rows = weighted_rows()
    write = write_csv if kind == "csv" else write_parquet
    schema, found = run(tmp_path, [write(rows, tmp_path / f"log.{kind}")], spec_with(**SPEC))
    assert (schema.weight, schema.missing_labels) == ("w", ["pay", "like"])
    by_id = {md5_id(row["uid"], 2**30): row for row in rows}
    counted = dict.fromkeys(SPEC["labels"], 0)
    positives = dict(counted)
    for split, stored in found.items():
        for got in stored:
            row = by_id[got["uid"]]
            in_space = row["click"] == 1 and row["price"] is not None and row["price"] >= 0
            observed = {"click": True, "pay": in_space, "like": row["like"] is not None}
            for label, is_there in observed.items():
                assert got[label] == (row[label] if is_there else NOT_OBSERVED)
                if split == "train" and is_there and row["w"]:
                    counted[label] += 1
                    positives[label] += row[label]
            assert got[WEIGHT_COLUMN] == row["w"]
    train = schema.splits["train"]
    assert train.counted == counted
    assert train.positive_rate == pytest.approx({label: positives[label] / n for label, n in counted.items()})
    for batch in Reader(tmp_path / "out", schema, "train", 64, num_lanes=2).epoch(0):
        assert batch.weights is not None and set(batch.labels.unique().tolist()) <= {0, 1}
        uids = batch.sparse["uid"].values().tolist()
        for uid, labels, weights in zip(uids, batch.labels.tolist(), batch.weights.tolist(), strict=True):
            row = by_id[uid]
            in_space = row["click"] == 1 and row["price"] is not None and row["price"] >= 0
            assert weights == [row["w"], row["w"] * in_space, row["w"] * (row["like"] is not None)]
            assert labels == [row["click"], row["pay"] if in_space else 0, row["like"] or 0]
    some = schema.select(None, ["click"])
    assert some.missing_labels == [] and some.has_weights
    batch = next(Reader(tmp_path / "out", some, "train", 64).epoch(0))
    assert batch.weights is not None and batch.weights.shape == (64, 1)


def test_a_number_that_is_not_there_fulfils_no_condition(tmp_path: Path) -> None:
    """Of a dense column, too, whether it is null or NaN, which is above all numbers to an engine."""
    made = []
    for name, missing in (("null", None), ("nan", math.nan)):
        rows = [{**row, "price": missing if row["price"] is None else row["price"]} for row in weighted_rows()]
        spec = spec_with(**{**SPEC, "numeric": [], "dense": ["price"]})
        schema, found = run(tmp_path, [write_parquet(rows, tmp_path / f"{name}.parquet")], spec, name)
        assert any(row["price"] is None for row in found["train"]) and not any(
            row["price"] != row["price"] for row in found["train"]
        )
        made.append((schema.dataset_id, schema.splits["train"].counted))
    assert made[0] == made[1]


def test_a_text_that_says_nan_fulfils_no_condition(tmp_path: Path) -> None:
    counted = []
    for name, missing in (("null", ""), ("nan", "nan")):
        lines = [f"{row % 2},{row % 2},{missing if row % 3 else row},{row}" for row in range(60)]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(["click,pay,price,item", *lines]) + "\n")
        spec = {"name": "s", "labels": ["click", "pay"], "categorical": ["item"], "ignore": ["price"], "min_count": 1}
        spec["split"] = {"type": "random", "ratios": [1, 1, 1]}
        schema, _ = run(tmp_path, [path], make_spec({**spec, "tasks": {"pay": {"where": "price > 0"}}}, "test"), name)
        counted.append(sum(split.counted["pay"] for split in schema.splits.values()))
    assert counted == [19, 19]


def test_a_label_that_is_nan_was_not_observed(tmp_path: Path) -> None:
    made = []
    for name, missing in (("null", None), ("nan", math.nan)):
        rows = weighted_rows()
        rows = [{**row, "like": missing if row["like"] is None else float(row["like"])} for row in rows]
        outside = [row["pay"] is None for row in rows]
        rows = [{**row, "pay": missing if gone else row["pay"]} for row, gone in zip(rows, outside, strict=True)]
        assert any(outside) and any(row["like"] is missing for row in rows)
        schema, _ = run(tmp_path, [write_parquet(rows, tmp_path / f"{name}.parquet")], spec_with(**SPEC), name)
        made.append((schema.dataset_id, [split.counted for split in schema.splits.values()]))
    assert made[0] == made[1]


def test_a_spec_without_them_gives_the_dataset_of_before(tmp_path: Path) -> None:
    """Keys, columns and batches; that the ids stay is in the digest of the committed samples' tests."""
    schema, found = run(tmp_path, [write_parquet(make_rows(300), tmp_path / "log.parquet")], spec_with(split=TIME))
    text = json.loads((tmp_path / "out/schema.json").read_text())
    assert not {"weight", "missing_labels"} & set(text) and not {"weight", "tasks"} & set(text["preparation"])
    assert "counted" not in text["splits"]["train"] and WEIGHT_COLUMN not in found["train"][0]
    assert next(Reader(tmp_path / "out", schema, "train", 64).epoch(0)).weights is None


BAD = {
    "negative": ({"w": -0.5}, {}, r"log\.parquet: row 42: column 'w' is -0\.5; a row weight must be a number from 0"),
    "nan": ({"w": math.nan}, {}, r"row 42: column 'w' is nan; a row weight"),
    "infinite": ({"w": math.inf}, {}, r"row 42: column 'w' is inf; a row weight"),
    "large": ({"w": 1e39}, {}, r"row 42: column 'w' is 1e\+39; a row weight"),
    "null": ({"w": None}, {}, r"row 42: column 'w' is missing; a row weight"),
    "label": ({"like": 2}, {}, r"row 42: column 'like' is 2.0; a label must be 0 or 1, or null"),
    "nan label": ({"click": math.nan}, {}, r"row 42: column 'click' is nan; a label must be 0 or 1"),
    "null label": ({"click": None}, {}, r"row 42: column 'click' is missing; a label must be 0 or 1"),
    "null in its space": (
        {"click": 1, "price": 1.0, "pay": None},
        {},
        r"row 42: column 'pay' is missing; a label must be 0 or 1 where click = 1 and price >= 0",
    ),
    "empty space": (
        {},
        {"pay": {"where": "price > 1e9"}},
        "label 'pay': no row of the train split counts .tasks.pay.where: price > 1e9",
    ),
    "nothing observed": ({}, {"like": {"where": "w > 5", "missing": True}}, "label 'like': no row of the train split"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_rows_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    changes, tasks, message = BAD[kind]
    rows = weighted_rows(200)
    rows[41] |= changes
    spec = spec_with(**{**SPEC, "tasks": {**TASKS, **tasks}})
    with pytest.raises(UserError, match=message):
        run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec)
    assert not (tmp_path / "out").exists()


def test_a_training_split_of_zeros_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "w": 1.0 if row["day"] >= "2024-01-12" else 0.0} for row in weighted_rows(200)]
    with pytest.raises(UserError, match=r"no row of the train split counts .zero weights in column 'w'"):
        run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(**SPEC))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": "price"}, "columns named in two roles: price"),
        ({"tasks": {"buy": {"missing": True}}}, "tasks: 'buy' is not under labels"),
        ({"tasks": {"pay": {}}}, "tasks.pay: it says nothing"),
        ({"tasks": {"pay": {"where": "tags = 1"}}}, "'tags' holds lists"),
        ({"tasks": {"pay": {"where": "pay = 1"}}}, "a condition on the label itself"),
        ({"tasks": {"pay": {"where": "click is 1"}}}, "'click is 1' is no comparison"),
        ({"tasks": {"pay": {"when": "click = 1"}}}, "unknown key 'tasks.pay.when', did you mean 'where'"),
    ],
)
def test_what_does_not_fit_the_columns_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        spec_with(**{**SPEC, **changes})


@pytest.mark.parametrize("bad", one_quick(math.nan, -1.0, math.inf))
def test_a_shard_with_an_odd_weight_is_refused(tmp_path: Path, bad: float) -> None:
    run(tmp_path, [write_parquet(weighted_rows(), tmp_path / "log.parquet")], spec_with(**SPEC))
    folder = tmp_path / "out"

    def change(table):
        weights = table[WEIGHT_COLUMN].to_pylist()
        weights[100] = bad
        return replace(table, WEIGHT_COLUMN, weights)

    schema = Schema.read(folder)
    split = schema.splits["train"]
    shard = split.shards[0].model_copy(update={"group_rows": 64})
    splits = {**schema.splits, "train": split.model_copy(update={"shards": [shard]})}
    schema.model_copy(update={"splits": splits}).write(folder)
    rewrite(folder, change)
    reseal(folder)
    with pytest.raises(UserError, match=r"00000\.parquet: row group 1 .*the weight is .* in row 100, must be finite"):
        list(Reader(folder, Schema.read(folder), "train", 64, num_lanes=2).epoch(0))
