"""Sequences given as lists, shared vocabularies, and specs of sequences that are refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.score_file import _pieces
from tests.histories import GIVEN, decoded, given_log, raw, write
from tests.sequence_log import features


def test_a_given_sequence_keeps_its_last_events_and_shares_ids(tmp_path: Path) -> None:
    log = given_log()
    schema = prepare(write(log, tmp_path / "log", 2), tmp_path / "data", make_spec(GIVEN, "spec"))
    features = {feature.name: feature for feature in schema.features}
    assert features["item"].table == features["watched"].table == "goods" and features["shop"].table == "shop"
    assert features["item"].num_embeddings == features["watched"].num_embeddings > 2 + 9
    values = raw(features["item"].encoding, tmp_path / "data")
    seen = set()
    for split in schema.splits.values():
        for shard in split.shards:
            for line in pq.read_table(tmp_path / "data" / shard.path).to_pylist():
                watched = tuple(int(values[i]) if i in values else None for i in line["watched"])
                assert len(line["watched"]) == len(line["shop"]) == len(line["spent"]) == len(line["ages"]) <= 2
                seen.add(watched)
    wanted = {tuple(items[-2:]) for items in log.watched}
    assert {one for one in seen if None not in one} <= wanted and len(wanted - seen) < 8
    lines, encoder = decoded(tmp_path / "data"), Encoder(schema, tmp_path / "data")
    singles, lists, *_ = encoder.encode(log)
    names = [feature.name for feature in schema.features if feature.kind == "list"]
    assert singles[0].tolist() == [lines[number]["item"] for number in log.row]
    for name, (ids, offsets) in zip(names, lists, strict=True):
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [lines[number][name] for number in log.row], name
    assert sum(line["spent"].count(0) for line in lines.values()) > 3


@pytest.mark.slow
def test_given_sequences_as_text_are_those_as_lists(tmp_path: Path) -> None:
    log = given_log()
    as_text = log.assign(tags=log.tags.map(lambda items: items[:2]))
    for column in ("watched", "shop", "spent", "ages", "tags"):
        joined = as_text[column].map(lambda items: "|".join("" if v is None else str(v) for v in items))
        # One missing item alone is what an empty list is, too.
        as_text[column] = joined
    lonely = (log.watched.map(len) == 1) & log.spent.map(lambda items: items == [None])
    as_text, log = as_text[~lonely], log[~lonely]
    (tmp_path / "text").mkdir()
    as_text.to_csv(tmp_path / "text" / "0.csv", index=False)
    cut = {"watched": {**GIVEN["sequences"]["watched"], "separator": "|"}}
    spec = {**GIVEN, "sequences": cut, "lists": {"tags": {"max_length": 2, "separator": "|"}}}
    prepare([str(tmp_path / "text")], tmp_path / "a", make_spec(spec, "spec"))
    prepare(write(log, tmp_path / "log", 1), tmp_path / "b", make_spec(GIVEN, "spec"))
    assert decoded(tmp_path / "a") == decoded(tmp_path / "b")
    encoder = Encoder(Schema.read(tmp_path / "a"), tmp_path / "a")
    for (mine, _), (theirs, _) in zip(
        encoder.encode(as_text)[1],
        Encoder(Schema.read(tmp_path / "b"), tmp_path / "b").encode(log)[1],
        strict=True,
    ):
        assert mine.tolist() == theirs.tolist()
    [piece] = _pieces(tmp_path / "text" / "0.csv", Schema.read(tmp_path / "a"), list(encoder.columns))
    for (mine, _), (theirs, _) in zip(encoder.encode(piece)[1], encoder.encode(as_text)[1], strict=True):
        assert mine.tolist() == theirs.tolist()
    as_text.loc[as_text.index[4], "ages"] = "soon"
    as_text.to_csv(tmp_path / "text" / "0.csv", index=False)
    with pytest.raises(ValueError, match=r"0\.csv: .* 'soon'") as refused:
        prepare([str(tmp_path / "text")], tmp_path / "c", make_spec(spec, "spec"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": {"s": {"max_length": 2}}}, "either columns, which are lists in the log, or from_log"),
        (
            {"sequences": {"watched": {**GIVEN["sequences"]["watched"], "columns": ["watched", "shp"]}}},
            "no column 'shp', did you mean 'shop'",
        ),
        ({"vocabularies": {"goods": ["item", "spent"]}}, "vocabularies.goods: 'spent' is not under categorical"),
        ({"vocabularies": {"goods": ["item", "shop"]}}, "column 'item' holds int64 and 'shop' string"),
        ({"vocabularies": {"tags": ["item", "watched"]}}, "a feature outside it has that name"),
        ({"vocabularies": {"a.b": ["item", "watched"]}}, "vocabulary 'a.b': PyTorch takes no table of that name"),
        ({"vocabularies": {"items": ["item", "watched"]}}, "vocabulary 'items': PyTorch takes no table of that name"),
        ({"vocabularies": {"goods": []}}, "vocabularies.goods: List should have at least 1 item"),
        ({"sequences": {"__w": GIVEN["sequences"]["watched"]}}, "sequence '__w': names beginning with __"),
        (
            {"sequences": {"s": {"from_log": {"by": "tags", "order": "row", "columns": ["item"]}, "max_length": 2}}},
            "sequences.s.from_log: 'tags' holds lists; by, order and where take single values",
        ),
        (
            {"sequences": {"s": {"from_log": {"by": "item", "order": "click", "columns": ["itm"]}, "max_length": 2}}},
            "sequences.s.from_log.columns: 'itm' is not under categorical or numeric",
        ),
    ],
)
def test_bad_sequences_are_refused_in_a_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        prepare(write(given_log(), tmp_path / "log", 1), tmp_path / "data", make_spec({**GIVEN, **change}, "spec"))
    assert "\n" not in str(refused.value) and not (tmp_path / "data").exists()


def test_events_of_unequal_columns_are_refused_by_row(tmp_path: Path) -> None:
    log = given_log()
    log.at[37, "shop"] = ["x", *log.shop[37]]
    with pytest.raises(ValueError, match=r"1\.parquet: row 8: sequence 'watched': 'watched' has \d, 'shop' has"):
        prepare(write(log, tmp_path / "log", 2), tmp_path / "data", make_spec(GIVEN, "spec"))


def schema_of(edits: dict[str, dict[str, Any]], sequences: Any = None) -> Schema:
    """That of a small dataset, some of its features changed."""
    changed = [feature.model_copy(update=edits.get(feature.name, {})) for feature in features()]
    events = [{"name": "clicked", "features": ["clicked_item", "clicked_age"], "age": "clicked_age"}]
    values = {"name": "x", "dataset_id": "x", "labels": ["click"], "splits": {}, "sequences": sequences or events}
    return Schema.model_validate({**values, "features": [feature.model_dump() for feature in changed]})


@pytest.mark.parametrize(
    ("edits", "sequences", "message"),
    [
        ({"viewed": {"num_embeddings": 41}}, None, "'clicked_item' and 'viewed' are of vocabulary 'item', but their"),
        ({"viewed": {"vocabulary": "tags"}}, None, "vocabulary 'tags' has the name of a feature that is not of it"),
        ({"clicked_age": {"max_length": 5}}, None, "sequence 'clicked': its features must have one max_length"),
        ({}, [{"name": "s", "features": ["user"]}], "sequence 's': 'user' is no list feature"),
        ({}, [{"name": "s", "features": ["viewed"], "age": "tags"}], "age 'tags' is not among its features"),
        ({}, [{"name": "s", "features": ["viewed"], "age": "viewed"}], "age 'viewed' is not in log buckets"),
        ({}, [{"name": n, "features": ["viewed"]} for n in "st"], "sequences 's' and 't' both have feature 'viewed'"),
        ({}, [{"name": "s", "features": [f]} for f in ("viewed", "tags")], "sequences: a name is used more than once"),
    ],
)
def test_a_schema_refuses_what_is_not_aligned_or_shared(edits: Any, sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schema_of(edits, sequences)


def test_some_features_keep_what_is_left_of_sequences(tmp_path: Path) -> None:
    schema = schema_of({})
    left = schema.select(["user", "clicked_item"], None).sequences
    assert [(one.name, one.features, one.age) for one in left] == [("clicked", ["clicked_item"], None)]
    assert schema.select(["user"], None).sequences == []
    schema.write(tmp_path)
    assert Schema.read(tmp_path) == schema
    plain = schema.model_copy(update={"sequences": [], "features": [features()[0]]})
    plain.write(tmp_path)
    text = (tmp_path / "schema.json").read_text()
    assert "sequences" not in text and '"vocabulary":' not in text  # as programs from before there were any read it
