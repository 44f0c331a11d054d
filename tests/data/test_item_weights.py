"""Weights of lists' items: cut and stored beside the ids, read with them, and refused where they cannot be."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.data.batch import row_keys
from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.weighted_log import SPEC, frame, pairs_of, write_weighted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    write_weighted(folder)
    return folder / "data"


def ids_of(data: Path, file: str) -> dict[str, int]:
    table = pq.read_table(data / "vocabularies" / f"{file}.parquet")
    return dict(zip(table["value"].to_pylist(), table["id"].to_pylist(), strict=True))


def stored(data: Path, split: str) -> list[dict[str, Any]]:
    paths = [data / shard.path for shard in Schema.read(data).splits[split].shards]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def expected(data: Path, log: pd.DataFrame) -> Counter[tuple[Any, ...]]:
    found: Counter[tuple[Any, ...]] = Counter()
    known = {"tags": ids_of(data, "tagged"), "words": ids_of(data, "words")}
    rows = zip(log["click"], *(pairs_of(log, name) for name in known), strict=True)
    for click, *lists in rows:
        parts = [
            (
                tuple(0 if value == "" else ids.get(value, 1) for value, _ in one),
                tuple(float(np.float32(weight)) for _, weight in one),
            )
            for ids, one in zip(known.values(), lists, strict=True)
        ]
        found[(click, *parts)] += 1
    return found


def test_shards_hold_the_weights_of_the_kept_items(data):
    log = frame()
    schema = Schema.read(data)
    assert {f.name: f.weights for f in schema.weighted_lists} == {"tags": "tags_w", "words": ":"}
    assert schema.feature_names == ["user", "tag", "tags", "words", "plain"]
    for split, rows in (("train", log[:400]), ("validation", log[400:500]), ("test", log[500:])):
        found = Counter(
            (
                row["click"],
                *((tuple(row[name]), tuple(row[f"__weights__{name}"])) for name in ("tags", "words")),
            )
            for row in stored(data, split)
        )
        assert found == expected(data, rows)
    shard = pq.read_schema(data / schema.splits["train"].shards[0].path)
    assert shard.field("__weights__tags").type == pa.list_(pa.float32())
    assert "__weights__plain" not in shard.names


def test_batches_hold_the_weights_in_the_order_of_the_ids(data):
    schema = Schema.read(data)
    seen: Counter[tuple[Any, ...]] = Counter()
    for batch in Reader(data, schema, "train", 64, num_lanes=4, seed=3).batches(1, 0):
        assert batch.item_weights.keys() == ["tags", "words"] and batch.item_weights.values().dtype == torch.float32
        columns = []
        for name in ("tags", "words"):
            ids, weights = batch.sparse[name], batch.item_weights[name]
            assert ids.lengths().tolist() == weights.lengths().tolist()
            columns.append(
                [
                    (tuple(i.tolist()), tuple(w.tolist()))
                    for i, w in zip(ids.to_dense(), weights.to_dense(), strict=True)
                ]
            )
        seen.update(zip(batch.labels[:, 0].long().tolist(), *columns, strict=True))
    assert seen == expected(data, frame()[:400])


def test_rows_of_other_weights_are_other_rows(data):
    batch = next(Reader(data, Schema.read(data), "train", 400, num_lanes=1).batches(0, 0))
    keys = row_keys(*batch.inputs)
    weights = batch.item_weights
    weights.values()[0] += 1
    changed = (row_keys(*batch.inputs) != keys).nonzero().flatten().tolist()
    assert changed == [int(weights["tags"].lengths().nonzero()[0])]


def test_without_weights_a_dataset_is_as_before(tmp_path):
    lists = {name: {k: v for k, v in one.items() if k != "weights"} for name, one in SPEC["lists"].items()}
    schema = write_weighted(tmp_path, lists=lists, ignore=["tags_w"])
    assert "weights" not in (tmp_path / "data" / "schema.json").read_text().replace("tags_w", "")
    assert all("weights" not in one for one in schema.preparation["lists"].values())
    batch = next(Reader(tmp_path / "data", schema, "train", 400, num_lanes=1).batches(0, 0))
    assert batch.item_weights is None


def test_days_that_are_added_have_weights_too(tmp_path):
    log = frame().drop(columns="row").assign(day=np.arange(600) // 200)
    write_weighted(tmp_path, log[:400], split={"type": "days", "column": "day"})
    log[400:].to_parquet(tmp_path / "more.parquet")
    add([str(tmp_path / "more.parquet")], tmp_path / "data", extend=True)
    rows = stored(tmp_path / "data", "2")
    weights = sorted(w for row in rows for w in row["__weights__tags"])
    assert weights == sorted(float(np.float32(w)) for one in pairs_of(log[400:], "tags") for _, w in one)


def refusal(folder: Path, log: pd.DataFrame | None = None, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        write_weighted(folder, log, **changes)
    return str(refused.value)


LISTS = (
    ([1, 2], [1.0], "column 'tags': 2 items, and 'tags_w' has 1 weights; every item has one"),
    ([1, 2], [1.0, -0.5], "column 'tags': the weight of item '2' is -0.5; a weight is a number from 0"),
    ([1, 2], None, "column 'tags': 2 items, and 'tags_w' has 0 weights"),
    (None, [1.0], "column 'tags': 0 items, and 'tags_w' has 1 weights"),
    ([1, 2], [np.nan, 0.5], "column 'tags': the weight of item '1' is missing"),
    ([1, 2], [np.inf, 0.5], "column 'tags': the weight of item '1' is inf"),
    ([1, 2, 3, 4], [1e39, 0.5, 1.0, 1.0], "column 'tags': the weight of item '1' is 1e+39"),
)
TEXTS = (
    ("a:1|b", "column 'words': the weight of item 'b' is missing or no number"),
    ("a:1|b:2|c:-1", "the weight of item 'c' is -1.0"),
    ("a:1||b:2", "is missing or no number"),
    ("a:nan", "is missing or no number"),
    ("a:inf", "is missing or no number"),
    ("a:1_0", "is missing or no number"),
    ("a: 1", "is missing or no number"),
    ("a:1e39", "the weight of item 'a' is 1e+39"),
    ("a:1|b:2|c:x", "the weight of item 'c' is missing or no number"),
)
SPECS = (
    ({"tags": {"max_length": 3, "weights": "tag_w"}}, {}, "no column 'tag_w', did you mean 'tags_w'?"),
    ({"tags": {"max_length": 3, "weights": ":"}}, {"ignore": ["tags_w"]}, "items with weights such as a:0.5 are text"),
    ({"plain": {"max_length": 3, "weights": "row"}}, {}, "column 'row' of weights holds"),
)


def bad_rows(few: bool) -> list[tuple[dict[str, Any], str]]:
    lists = [({"tags": items, "tags_w": weights}, words) for items, weights, words in LISTS]
    texts = [({"words": text}, words) for text, words in TEXTS]
    return [*lists[:2], *texts[:2]] if few else [*lists[2:], *texts[2:]]


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bad_weights_are_refused_in_one_line(tmp_path, few):
    for number, (values, words) in enumerate(bad_rows(few)):
        log = frame(80)
        for name, value in values.items():
            log.at[11, name] = value
        # Of items that are cut off, too.
        said = refusal(tmp_path / f"{number}", log, split={"type": "random"}, ignore=["row"])
        assert words in said and "log.parquet: row 12: " in said and "\n" not in said
    for number, (lists, more, words) in enumerate(() if few else SPECS):
        rest = {name: SPEC["lists"][name] for name in ("tags", "words", "plain") if name not in lists}
        assert words in refusal(tmp_path / f"spec{number}", lists={**lists, **rest}, **more)


def test_marks_and_roles_that_cannot_be(tmp_path):
    for lists, words in (
        ({"tags": {"max_length": 3, "weights": "user"}}, "columns named in two roles: user"),
        ({"words": {"max_length": 3, "weights": ".", "separator": "|"}}, "may be within a number"),
        ({"words": {"max_length": 3, "weights": "|", "separator": "||"}}, "are not apart"),
    ):
        with pytest.raises(UserError, match=words):
            make_spec({**SPEC, "lists": lists, "vocabularies": {}}, "test")


def test_a_shard_with_wrong_weights_is_refused(tmp_path):
    schema = write_weighted(tmp_path)
    shard = schema.splits["train"].shards[0]
    path = tmp_path / "data" / shard.path
    table = pq.read_table(path)
    good = table["__weights__tags"].to_pylist()
    at = next(row for row, one in enumerate(good) if one)
    place = table.schema.get_field_index("__weights__tags")
    for weights, words in (
        ([*good[at], 1.0], "has not one weight for each id"),
        ([-1.0] * len(good[at]), "holds -1.0"),
    ):
        bad = [*good[:at], weights, *good[at + 1 :]]
        field = table.schema.field(place)
        pq.write_table(table.set_column(place, field, pa.array(bad, field.type)), path, row_group_size=shard.group_rows)
        bare = schema.splits["train"].model_copy(
            update={"shards": [shard.model_copy(update={"footer": None})], "num_rows": shard.num_rows}
        )
        changed = schema.model_copy(update={"splits": {**schema.splits, "train": bare}})
        with pytest.raises(UserError, match=words):
            next(Reader(tmp_path / "data", changed, "train", 400, num_lanes=1).batches(0, 0))


def test_text_files_have_both_forms(tmp_path):
    log = frame()

    def joined(values: Any) -> str:
        return "|".join(map(str, values)) if values is not None else ""

    text = log.assign(tags=log["tags"].map(joined), tags_w=log["tags_w"].map(joined), plain=log["plain"].map(joined))
    text.to_csv(tmp_path / "log.csv", index=False)
    lists = {name: {**one, "separator": "|"} for name, one in SPEC["lists"].items()}
    prepare([str(tmp_path / "log.csv")], tmp_path / "text", make_spec({**SPEC, "lists": lists}, "test"))
    write_weighted(tmp_path / "typed")
    for split in ("train", "test"):
        assert stored(tmp_path / "text", split) == stored(tmp_path / "typed" / "data", split)
