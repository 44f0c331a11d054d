"""Hash buckets for frequent values alone, against plain Python."""

from collections import Counter

import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.schema import SPLITS, Schema
from ssr_rec.data.table_usage import table_use
from ssr_rec.serving.raw_rows import Encoder
from tests.cases import one_quick
from tests.prepare_log import make_rows, md5_id, read_split, run, spec_with, write_csv, write_parquet

ROWS = make_rows(2000)
BUCKETS = {"uid": 2**30, "city": 5, "tags": 15}


def id_of(value, buckets, admitted):
    if value is None:
        return 0
    return 1 + md5_id(value, buckets) if value in admitted else 1


@pytest.mark.parametrize("write", one_quick(write_csv, write_parquet))
def test_values_rarer_in_training_than_the_minimum_share_an_id(tmp_path, write):
    log = write(ROWS, tmp_path / f"log.{'csv' if write is write_csv else 'parquet'}")
    schema, splits = run(tmp_path, [log], spec_with(hash_buckets=BUCKETS, hash_min_count=4))
    # Every row is known by its group, the user, and the order of the plain hash of the same preparation.
    _, plain = run(tmp_path, [log], spec_with(hash_buckets={"uid": 2**30}), "plain")
    by_hash = {md5_id(row["uid"], 2**30): row for row in ROWS}
    raw = {split: [by_hash[row["uid"]] for row in plain[split]] for split in SPLITS}
    cities = Counter(row["city"] for row in raw["train"] if row["city"] is not None)
    tags = Counter(tag for row in raw["train"] for tag in (row["tags"] or [])[:4])
    admitted = {name: {v for v, n in counts.items() if n >= 4} for name, counts in (("city", cities), ("tags", tags))}
    rare = 0
    for split in SPLITS:
        for row, source in zip(splits[split], raw[split], strict=True):
            assert row["uid"] == 1  # every one is there once
            assert row["city"] == id_of(source["city"], 5, admitted["city"])
            assert row["tags"] == [id_of(tag, 15, admitted["tags"]) for tag in (source["tags"] or [])[:4]]
            rare += row["city"] == 1
    assert rare > 100 and len(admitted["city"]) > 5  # so that some of 5 buckets are shared
    sizes = {feature.name: feature.num_embeddings for feature in schema.features}
    assert (sizes["city"], sizes["tags"], sizes["uid"]) == (7, 17, 2**30 + 2)
    # What is served has the same ids.
    encoded = Encoder(schema, tmp_path / "out").encode([{**row, "tags": row["tags"] or []} for row in raw["test"]])
    singles = [feature.name for feature in schema.features if feature.kind != "list"]
    for name, ids in zip(singles, encoded.ids, strict=True):
        assert ids.tolist() == [row[name] for row in splits["test"]]
    assert encoded.lists[0][0].tolist() == [tag for row in splits["test"] for tag in row["tags"]]
    use = {use.name: use for use in table_use(tmp_path / "out", schema)}
    assert (use["city"].values, use["city"].values_ids) == (
        len(admitted["city"]),
        len({md5_id(city, 5) for city in admitted["city"]}),
    )
    assert use["city"].oov == sum(row["city"] == 1 for row in splits["train"]) / len(splits["train"])


@pytest.mark.slow
def test_days_added_keep_who_was_admitted(tmp_path):
    days = sorted({row["day"] for row in ROWS})
    spec = spec_with(split={"type": "days", "column": "day", "fit_days": 3}, hash_buckets=BUCKETS, hash_min_count=3)
    early, late = ([row for row in ROWS if (row["day"] < days[6]) is first] for first in (True, False))
    prepare([str(write_parquet(ROWS, tmp_path / "all.parquet"))], tmp_path / "whole", spec)
    prepare([str(write_parquet(early, tmp_path / "early.parquet"))], tmp_path / "grown", spec)
    grown = add([str(write_parquet(late, tmp_path / "late.parquet"))], tmp_path / "grown", extend=True)
    whole = Schema.read(tmp_path / "whole")
    assert {f.name: f.encoding for f in grown.features if f.name in BUCKETS} == {
        f.name: f.encoding for f in whole.features if f.name in BUCKETS
    }
    for day in days[6:]:
        mine, theirs = (
            [[row[name] for name in BUCKETS] for row in read_split(tmp_path / name, schema, day)]
            for name, schema in (("grown", grown), ("whole", whole))
        )
        assert mine == theirs


def test_admission_of_nothing_is_refused():
    with pytest.raises(ValueError, match="hash_min_count: 3 has no effect without hash_buckets; see min_count"):
        spec_with(hash_buckets={}, hash_min_count=3)
    with pytest.raises(ValueError, match=r"2147483647 for uid is not within 1\.\.2147483646"):
        spec_with(hash_buckets={"uid": 2**31 - 1}, hash_min_count=2)


def test_without_admission_the_dataset_is_what_it_was(tmp_path):
    schema, _ = run(tmp_path, [write_parquet(ROWS[:300], tmp_path / "log.parquet")], spec_with())
    assert "hash_min_count" not in schema.preparation
