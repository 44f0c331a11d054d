"""The report of table use against plain counting."""

import json
import math
from collections import Counter

import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.table_usage import expected_collisions
from tests.prepare_log import make_rows, md5_id, read_split, spec_with, write_parquet
from tools.show_data import main

ROWS = make_rows(1500)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("use")
    spec = spec_with(hash_buckets={"uid": 700, "tags": 30})
    schema = prepare([str(write_parquet(ROWS, folder / "log.parquet"))], folder / "data", spec)
    return folder / "data", schema


def told(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, {feature["name"]: feature for feature in json.loads(lines[-1])["features"]}


def test_the_dataset_is_told_in_one_line(prepared, capsys):
    folder, schema = prepared
    lines, _ = told(capsys, folder, "--threads", "1")
    header, _, cells = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines[:3])
    found = dict(zip(header, cells, strict=True))
    rows = [row for split in schema.splits for row in read_split(folder, schema, split)]
    kinds = Counter(feature.encoding.type for feature in schema.features if feature.kind != "list")
    assert int(found["samples"].replace(",", "")) == len(rows)
    assert int(found["numerical"]) == kinds.pop("log_buckets") and int(found["categorical"]) == kinds.total()
    label = schema.labels[0]
    share = sum(row[label] for row in rows) / len(rows)
    assert f"{label} {share:.2%}" in found["positive"]
    special = [len({getattr(f.encoding, n, None) for n in ("missing_id", "oov_id")} - {None}) for f in schema.features]
    values = sum(f.num_embeddings - ids for f, ids in zip(schema.features, special, strict=True))
    assert int(found["feature values"].replace(",", "")) == values


def test_every_figure_is_what_counting_gives(prepared, capsys):
    folder, schema = prepared
    lines, features = told(capsys, folder, "--threads", "1")
    train = read_split(folder, schema, "train")
    for feature in schema.features:
        looked_up = [i for row in train for i in (row[feature.name] if feature.kind == "list" else [row[feature.name]])]
        counts = Counter(looked_up)
        found, total = features[feature.name], len(looked_up)
        assert (found["table_rows"], found["ids"], found["lookups"]) == (feature.num_embeddings, len(counts), total)
        assert found["missing"] == pytest.approx(counts[0] / total)
        assert found["oov"] == (pytest.approx(counts[1] / total) if found["kind"] == "vocabulary" else None)
        assert found["used"] == len(counts) / feature.num_embeddings
        top = [count for _, count in counts.most_common(max(1, len(counts) // 100))]
        assert found["top_id"] == top[0] / total and found["top_percent"] == pytest.approx(sum(top) / total)
        line = next(line for line in lines if line.startswith(f"| {feature.name} |"))
        assert f"| {len(counts):,} |" in line and f"| {feature.num_embeddings:,} |" in line
    assert len(Counter(row["uid"] for row in train)) // 100 > 1  # so that one per cent is more than one id


def test_collisions_are_those_of_the_values_in_the_log(prepared, capsys):
    _, features = told(capsys, prepared[0])
    for name, buckets, values in (
        ("uid", 700, {row["uid"] for row in ROWS}),
        ("tags", 30, {tag for row in ROWS for tag in (row["tags"] or [])[:4]}),
    ):
        ids = {md5_id(value, buckets) for value in values}
        found = features[name]
        assert (found["values"], found["values_ids"], found["load"]) == (
            *(len(values), len(ids)),
            len(values) / buckets,
        )
        assert found["collisions"] == pytest.approx(1 - len(ids) / len(values))
        # Three standard deviations of the number of buckets in use, which is below sqrt(values).
        assert abs(found["collisions"] - found["expected_collisions"]) < 3 * math.sqrt(len(values)) / len(values)
    assert features["user"]["collisions"] is None


@pytest.mark.parametrize(("values", "buckets"), [(1, 7), (5, 1), (50, 3), (400, 1000), (3, 2**31 - 1)])
def test_expected_collisions(values, buckets):
    in_use = 0.0  # expected number after each value, one after the other
    for _ in range(values):
        in_use += 1 - in_use / buckets
    assert expected_collisions(values, buckets) == pytest.approx((values - in_use) / values, rel=1e-6, abs=1e-15)


def test_what_is_not_known_is_said(tmp_path, capsys):
    rule = {"type": "days", "column": "day", "fit_days": 1}
    days = sorted({row["day"] for row in ROWS})
    first, last = ([row for row in ROWS if (row["day"] < days[3]) is early] for early in (True, False))
    spec = spec_with(split=rule, hash_buckets={"uid": 50})
    prepare([str(write_parquet(first, tmp_path / "a.parquet"))], tmp_path / "data", spec)
    lines, features = told(capsys, tmp_path / "data", "--plot", tmp_path / "use.png")
    assert features["uid"]["values"] == len(first) == features["uid"]["lookups"]
    assert not any("not known" in line for line in lines)
    assert (tmp_path / "use.png").stat().st_size > 10_000
    add([str(write_parquet(last, tmp_path / "b.parquet"))], tmp_path / "data")
    lines, features = told(capsys, tmp_path / "data")
    assert features["uid"]["lookups"] == len(ROWS) and features["uid"]["values"] is None
    assert any(line.startswith("not known: how many values of uid collide") for line in lines)
    assert main([str(tmp_path)]) == 2
    assert "show_data: " in capsys.readouterr().err
