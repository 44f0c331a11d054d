"""Shares of missing and unknown values are counted as a loop does, and said where they are unlike training's."""

from pathlib import Path

import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.schema import Schema
from ssr_rec.data.table_usage import split_lookups
from ssr_rec.runs.quality import quality_warnings
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.value_shares import ValueShares
from tests.prepare_log import make_rows, read_split, run, spec_with, write_csv, write_parquet

ROWS = make_rows(2000)


def looped(rows: list[dict], schema: Schema, name: str) -> dict[str, int]:
    """The counts of a feature over stored rows, one id after the other."""
    feature = next(f for f in schema.features if f.name == name)
    ids = [i for row in rows for i in (row[name] if feature.kind == "list" else [row[name]])]
    oov = getattr(feature.encoding, "oov_id", None)
    return {"total": len(ids), "missing": ids.count(feature.encoding.missing_id), "oov": ids.count(oov)}


def test_every_split_of_a_dataset_has_its_counts_and_training_their_sum(tmp_path: Path) -> None:
    schema, stored = run(tmp_path, [write_csv(ROWS, tmp_path / "a.csv")], spec_with())
    for split, rows in stored.items():
        for name in schema.feature_names:
            assert schema.splits[split].lookups[name].model_dump() == looped(rows, schema, name), (split, name)
    assert schema.trained_lookups == schema.splits["train"].lookups
    assert sum(schema.trained_lookups[n].oov for n in schema.feature_names) > 0
    older = {n: split.model_copy(update={"lookups": {}}) for n, split in schema.splits.items()}
    counted = split_lookups(tmp_path / "out", schema.model_copy(update={"splits": older}))
    assert counted == split_lookups(tmp_path / "out", schema) == {n: s.lookups for n, s in schema.splits.items()}
    assert all(shard.lookups is None for split in schema.splits.values() for shard in split.shards)


@pytest.mark.slow
def test_added_days_count_as_days_that_were_there(tmp_path: Path) -> None:
    spec = spec_with(split={"type": "days", "column": "day", "fit_days": 3})
    last = max(row["day"] for row in ROWS)
    old = write_parquet([row for row in ROWS if row["day"] != last], tmp_path / "old.parquet")
    new = write_parquet([row for row in ROWS if row["day"] == last], tmp_path / "new.parquet")
    prepare([str(old)], tmp_path / "data", spec)
    grown = add([str(new)], tmp_path / "data")
    whole = prepare([str(old), str(new)], tmp_path / "whole", spec)
    assert {d: s.lookups for d, s in grown.splits.items()} == {d: s.lookups for d, s in whole.splits.items()}
    rows = [row for day in whole.splits for row in read_split(tmp_path / "whole", whole, day)]
    assert whole.trained_lookups["city"].model_dump() == looped(rows, whole, "city")


@pytest.mark.parametrize("pieces", [1, 7])
def test_scoring_counts_and_says_which_column_is_unlike_training(tmp_path: Path, pieces: int) -> None:
    schema, stored = run(tmp_path, [write_csv(ROWS, tmp_path / "a.csv")], spec_with())
    encoder = Encoder(schema, tmp_path / "out")
    same, other = (ValueShares(schema.features, schema.trained_lookups) for _ in range(2))
    size = -(-len(ROWS) // pieces)
    for start in range(0, len(ROWS), size):
        piece = ROWS[start : start + size]
        same.add(*encoder.encode(piece)[:3])
        other.add(*encoder.encode([{**row, "user": f"u{row['user']}", "price": None} for row in piece])[:3])
    everything = [row for rows in stored.values() for row in rows]
    for name, found in same.counts().items():
        assert found.model_dump() == looped(everything, schema, name), name
    assert same.far_from_training() == {}
    far = other.far_from_training()
    assert set(far) == {"user", "price"}
    assert "user: 100.0% of 2,000 values are unknown, 0.2% in training" in far["user"]
    assert "values are missing" in far["price"]


def test_a_bad_model_is_called_one_with_the_reason(tmp_path: Path) -> None:
    cities = [{**row, "city": f"new {row['uid']}" if row["uid"] >= 1500 else "Ulm"} for row in ROWS]
    by_time = {"type": "time", "column": "day", "ratios": [0.7, 0.1, 0.2]}
    schema, _ = run(tmp_path, [write_csv(cities, tmp_path / "a.csv")], spec_with(split=by_time))
    good = {"ne": 0.99, "calibration": 1.24}
    assert quality_warnings(schema, {"validation": {"click": good}, "test": {"click": good}}) == []
    said = quality_warnings(
        schema, {"validation": {"click": good}, "test": {"click": {"ne": 1.05, "calibration": 0.5}}}
    )
    assert [sentence.split(":")[0] for sentence in said] == ["test click", "test click", "likely reason"]
    assert "NE 1.0500 is above 1" in said[0] and "calibration .5000" in said[1]
    assert "on test 100.0% of city are out of vocabulary (0.0% in training)" in said[2]
    undefined = {"click": {"ne": float("nan"), "calibration": float("nan")}}
    assert quality_warnings(schema, {"test": undefined}) == []
