"""The id of a dataset is that of its rows; a dataset made before it was is read as it is."""

import json
from pathlib import Path

import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import SCHEMA_FILE, Schema
from tests.prepare_log import make_rows, spec_with, write_csv, write_parquet
from tests.prepare_log import run as prepared

ROWS = make_rows(600)


def swapped(rows: list[dict], column: str) -> list[dict]:
    """Two rows' values of one column changed places: the counts, and so vocabularies and rates, stay as they were."""
    first = next(row for row in rows if row[column])
    other = next(row for row in rows if row[column] not in (None, first[column]) and row["day"] == first["day"])
    changed = {id(first): other[column], id(other): first[column]}
    return [{**row, column: changed.get(id(row), row[column])} for row in rows]


def test_rows_that_differ_in_one_pair_of_values_have_another_id(tmp_path: Path) -> None:
    spec = spec_with(hash_buckets=1013)
    schema, _ = prepared(tmp_path, [write_csv(ROWS, tmp_path / "a.csv")], spec, "a")
    same, _ = prepared(tmp_path, [write_parquet(ROWS, tmp_path / "b.parquet")], spec, "b")
    assert same.dataset_id == schema.dataset_id
    for column in ["click", "city", "tags", "price", "uid"]:
        log = write_csv(swapped(ROWS, column), tmp_path / f"{column}.csv")
        other, _ = prepared(tmp_path, [log], spec, column)
        assert other.dataset_id != schema.dataset_id and other.shard_ids == schema.shard_ids, column


@pytest.mark.slow
def test_added_days_are_of_the_id_and_old_datasets_keep_theirs(tmp_path: Path) -> None:
    spec = spec_with(split={"type": "days", "column": "day", "fit_days": 3})
    days = sorted({row["day"] for row in ROWS})
    log = {
        "old": write_parquet([row for row in ROWS if row["day"] != days[-1]], tmp_path / "old.parquet"),
        "new": write_parquet([row for row in ROWS if row["day"] == days[-1]], tmp_path / "new.parquet"),
    }
    log["other"] = write_parquet(
        swapped([row for row in ROWS if row["day"] == days[-1]], "city"), tmp_path / "other.parquet"
    )
    ids = set()
    for new in ("new", "other"):
        folder = tmp_path / f"data_{new}"
        old = prepare([str(log["old"])], folder, spec)
        grown = add([str(log[new])], folder)
        assert grown.known_ids == {old.dataset_id, grown.dataset_id} and len(grown.shard_ids) == 2
        assert sum(len(batch.labels) for batch in Reader(folder, grown, days[-1], 16).epoch(0)) > 0
        ids.add(grown.dataset_id)
    assert len(ids) == 2
    # As written before rows counted: shards carry the id itself.
    text = json.loads((folder / SCHEMA_FILE).read_text())
    for key in ("checksum", "shard_ids"):
        del text[key]
    for split in text["splits"].values():
        for shard in split["shards"]:
            del shard["content"]
    text["dataset_id"], text["additions"][0]["before"] = grown.shard_ids[1], grown.shard_ids[0]
    (folder / SCHEMA_FILE).write_text(json.dumps(text))
    assert Schema.read(folder).dataset_id == grown.shard_ids[1]
    for day in days:
        assert sum(len(batch.labels) for batch in Reader(folder, Schema.read(folder), day, 16).epoch(0)) > 0
