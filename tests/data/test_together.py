"""Groups of rows that are shuffled and split as wholes, against plain loops over the log."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.data.batch_order import order_of_groups, runs_of
from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.rows import SplitRows
from tests.data.test_negatives import place
from tests.prepare_log import make_rows, md5_id, read_split, run, spec_with, write_parquet

SEED = 5
SPLITS = {"random": {"type": "random", "ratios": [6, 2, 2]}}
SPLITS["time"] = {"type": "time", "column": "day", "boundaries": ["2024-01-12", "2024-01-16"]}
IGNORE = ["day", "request"]


def requests(count: int = 3000) -> list[dict[str, Any]]:
    """Rows of requests of 1 to 12 rows, those of neighbouring requests mixed, as a log of several servers has them."""
    rows, left, number = make_rows(count), [], 0
    for row in rows:
        while len(left) < 5:
            left += [(f"r{number}")] * (1 + number * 7 % 12)
            number += 1
        row["request"] = left.pop((row["uid"] * 13) % 5)
    return rows


ROWS = requests()


@pytest.mark.parametrize("split", list(SPLITS))
def test_groups_lie_together_as_the_definition_says(split, tmp_path):
    path = write_parquet(ROWS, tmp_path / "log.parquet")
    spec = spec_with(split=SPLITS[split], together="request", ignore=IGNORE)
    schema, found = run(tmp_path, [path], spec, seed=SEED)
    first: dict[str, int] = {}
    for row in ROWS:
        first.setdefault(row["request"], row["uid"])
    order = sorted(ROWS, key=lambda row: (place(first[row["request"]], SEED), row["uid"]))

    def split_of(row: dict[str, Any]) -> str:
        if split == "time":
            return "train" if row["day"] < "2024-01-12" else "validation" if row["day"] < "2024-01-16" else "test"
        share = place(first[row["request"]], SEED) / 2**31
        return "train" if share < 0.6 else "validation" if share < 0.8 else "test"

    for name in ("train", "validation", "test"):
        expected = [row for row in order if split_of(row) == name]
        assert [row["uid"] for row in found[name]] == [md5_id(row["uid"], 2**30) for row in expected]
        runs = [request for request, _ in groupby(row["request"] for row in expected)]
        assert len(runs) == len(set(runs)) > 30
        begin = sum(first[row["request"]] == row["uid"] for row in expected)
        assert schema.splits[name].groups == begin
    assert schema.together_column == "__together__"
    # The ids are those of group ids: 60 bits of the md5 of text.
    assert len({row["__together__"] for name in found for row in found[name]}) == len(first)
    (batch,) = SplitRows.read(tmp_path / "out", schema, "test").batches()
    assert batch.together is not None and batch.together.tolist() == [row["__together__"] for row in found["test"]]


def test_without_groups_a_dataset_is_what_it_was(tmp_path):
    path = write_parquet(ROWS[:500], tmp_path / "log.parquet")
    schema, _ = run(tmp_path, [path], spec_with(ignore=IGNORE))
    text = (tmp_path / "out" / "schema.json").read_text()
    assert schema.together is None and "together" not in text and '"groups"' not in text


def test_the_group_id_itself_is_stored_once(tmp_path):
    path = write_parquet(ROWS, tmp_path / "log.parquet")
    schema, found = run(tmp_path, [path], spec_with(together="user", ignore=IGNORE))
    assert schema.together_column == "__group_id__" and "__together__" not in found["train"][0]
    users = [row["__group_id__"] for row in found["train"]]
    assert len([user for user, _ in groupby(users)]) == len(set(users)) == schema.splits["train"].groups


def test_days_added_later_are_those_of_a_whole_log(tmp_path):
    days = sorted({row["day"] for row in ROWS})[:12]
    rows = [row for row in ROWS if row["day"] in days]
    spec = spec_with(split={"type": "days", "column": "day", "fit_days": 3}, together="request", ignore=["request"])
    paths = {
        name: str(write_parquet([row for row in rows if row["day"] in of], tmp_path / f"{name}.parquet"))
        for name, of in (("whole", days), ("old", days[:8]), ("new", days[8:]))
    }
    prepare([paths["whole"]], tmp_path / "whole", spec)
    prepare([paths["old"]], tmp_path / "grown", spec)
    schema = add([paths["new"]], tmp_path / "grown")
    for day in days:
        assert read_split(tmp_path / "grown", schema, day) == read_split(
            tmp_path / "whole", Schema.read(tmp_path / "whole"), day
        )
        assert schema.splits[day].groups


def test_a_log_on_disk_in_several_files_is_the_same(tmp_path, monkeypatch):
    spec = spec_with(split=SPLITS["random"], together="request", ignore=IGNORE)
    one, _ = run(tmp_path, [write_parquet(ROWS, tmp_path / "log.parquet")], spec, "one")
    parts = [write_parquet(ROWS[:1200], tmp_path / "a.parquet"), write_parquet(ROWS[1200:], tmp_path / "b.parquet")]
    monkeypatch.setattr("ssr_rec.data.preparation.duckdb_engine.STAGED_SHARE", 10**12)
    two, _ = run(tmp_path, parts, spec, "two")
    assert one == two


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"together": "tags"}, "together: 'tags' holds lists"),
        ({"together": "request", "negatives": 0.5, "group_id": None}, "together: request keeps groups whole"),
        ({"together": "reqest"}, "no column 'reqest', did you mean 'request'"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes, said, tmp_path):
    path = write_parquet(ROWS[:300], tmp_path / "log.parquet")
    with pytest.raises(UserError, match=said):
        run(tmp_path, [path], spec_with(**{"ignore": IGNORE, **changes}))


def test_a_row_without_a_group_is_refused(tmp_path):
    rows = [{**row, "request": None if row["uid"] == 7 else row["request"]} for row in ROWS[:300]]
    with pytest.raises(UserError, match=r"row 8: column 'request' is missing; the id of together must not be missing"):
        run(tmp_path, [write_parquet(rows, tmp_path / "log.parquet")], spec_with(together="request", ignore=IGNORE))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Schema]:
    folder = tmp_path_factory.mktemp("together")
    path = write_parquet(requests(24_000), folder / "log.parquet")
    spec = spec_with(split=SPLITS["random"], together="request", ignore=IGNORE)
    return folder / "out", prepare([str(path)], folder / "out", spec)


def batches(prepared: tuple[Path, Schema], rank: int, ranks: int, epoch: int = 0, lanes: int = 4) -> list:
    folder, schema = prepared
    return list(Reader(folder, schema, "train", 256, (rank, ranks), lanes, seed=3).batches(epoch, 0))


def test_runs_of_a_batch_are_the_same_on_any_number_of_ranks(prepared):
    whole, parts = batches(prepared, 0, 1), [batches(prepared, rank, 2) for rank in range(2)]
    assert len(whole) > 50
    for alone, *together in zip(whole, *parts, strict=True):
        ids = torch.cat([batch.together for batch in together])
        assert torch.equal(alone.together, ids)
        assert torch.equal(alone.runs, torch.cat([together[0].runs, together[1].runs + together[0].runs.max() + 1]))


def test_an_epoch_shuffles_groups_and_its_cuts_are_as_many_as_said(prepared):
    folder, schema = prepared
    epochs = [[batch.together.tolist() for batch in batches(prepared, 0, 1, epoch)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    rows = [Counter(row for batch in epoch for row in batch) for epoch in epochs]
    assert rows[0] == rows[1] and sum(rows[0].values()) == schema.splits["train"].num_rows
    runs = sum(len(batch.runs.unique()) for batch in batches(prepared, 0, 1))
    groups = schema.splits["train"].groups
    said = Reader(folder, schema, "train", 256, num_lanes=4).share_cut()
    assert groups is not None and said is not None and 0.05 < said < 0.2
    assert (runs - groups) / groups == pytest.approx(said, rel=0.15)


def test_a_resumed_epoch_has_the_same_runs(prepared):
    folder, schema = prepared
    reader = Reader(folder, schema, "train", 256, num_lanes=4, seed=3)
    for one, two in zip(list(reader.batches(1, 0))[20:], reader.batches(1, 20), strict=True):
        assert torch.equal(one.runs, two.runs) and torch.equal(one.together, two.together)


def test_an_order_of_groups_keeps_them_whole():
    ids = np.array([4, 4, -1, 7, 7, 7, 2])
    seen = set()
    for seed in range(300):
        order = order_of_groups(ids, np.random.default_rng(seed))
        assert sorted(order) == list(range(7))
        runs = [list(run) for _, run in groupby(order, key=lambda row: ids[row])]
        assert all(run == list(range(run[0], run[0] + len(run))) for run in runs)
        seen.add(tuple(run[0] for run in runs))
    assert len(seen) == math.factorial(4)
    assert order_of_groups(ids[:0], np.random.default_rng(0)).tolist() == []


def test_a_run_ends_with_its_lane():
    assert runs_of(np.array([5, 5, 5, 5, 0, 0, 3]), [2, 0, 3, 2]).tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert runs_of(np.array([], dtype=np.int64), [0, 0]).tolist() == []
