"""Slices against pandas and scikit-learn, names of values, and drift against plain counting."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.explaining.drift import BINS, drift, psi
from ssr_rec.explaining.slices import slices, worst_first
from ssr_rec.explaining.values import Column, read_column
from ssr_rec.metrics.by_value import auc_error
from ssr_rec.metrics.exact import auc
from tests.prepare_log import make_rows, read_split, spec_with, write_parquet


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    rows = make_rows(2000)
    split = {"type": "time", "column": "day", "boundaries": ["2024-01-12", "2024-01-16"]}
    spec = spec_with(split=split, ignore=[], categorical=["user", "city", "uid", "day"])
    schema = prepare([str(write_parquet(rows, folder / "log.parquet"))], folder / "data", spec)
    return folder / "data", schema


def test_slices_are_pandas_and_scikit_learns():
    rng = np.random.default_rng(0)
    codes, logits = rng.choice(6, 3000, p=[0.4, 0.3, 0.2, 0.08, 0.015, 0.005]), rng.normal(-1, 1, 3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(-logits * (codes % 3)))).astype(float)
    column = Column("page", codes, [f"p{i}" for i in range(6)])
    found = {one["value"]: one for one in slices(logits, labels, column, min_rows=100)}
    frame = pd.DataFrame({"code": codes, "x": logits, "y": labels, "p": 1 / (1 + np.exp(-logits))})
    assert set(found) == {"p0", "p1", "p2", "p3", "(rarer values)"} and found["(rarer values)"]["values"] == 2
    for value, one in found.items():
        part = frame[frame.code >= 4] if value == "(rarer values)" else frame[frame.code == int(value[1])]
        assert (one["rows"], one["positives"]) == (len(part), part.y.sum())
        assert one["auc"] == pytest.approx(roc_auc_score(part.y, part.x))
        assert one["logloss"] == pytest.approx(log_loss(part.y, part.p))
        assert one["calibration"] == pytest.approx(part.p.sum() / part.y.sum())
    for order in ("auc", "logloss", "calibration"):
        *ranked, last = worst_first(list(found.values()), order)
        values = [one[order] for one in ranked]
        assert last["value"] == "(rarer values)"
        if order == "calibration":
            values = [-abs(math.log(value)) for value in values]
        assert values == sorted(values, reverse=order == "logloss")
    lost = [{"auc": math.nan}, {"auc": 0.9}, {"auc": 0.4}]
    assert [one["auc"] for one in worst_first(lost, "auc")][:2] == [0.4, 0.9]


def test_the_error_of_an_auc_is_its_spread_over_samples():
    rng = np.random.default_rng(1)
    areas = []
    for _ in range(200):
        labels = np.repeat([0, 1], [120, 60])
        areas.append(auc(rng.normal(labels, 1), labels))
    assert auc_error(float(np.mean(areas)), 60, 180) == pytest.approx(np.std(areas), rel=0.2)
    assert math.isnan(auc_error(0.5, 0, 10))


def test_columns_have_the_values_of_the_log(prepared):
    folder, schema = prepared
    rows = read_split(folder, schema, "test")
    city = read_column(folder, schema, "test", "city", len(rows))
    assert "(missing)" in city.names and "Ulm" in city.names
    table = {
        row["id"]: row["value"] for row in pd.read_parquet(folder / "vocabularies/city.parquet").to_dict("records")
    }
    named = [city.names[code] for code in city.codes]
    assert named == [{0: "(missing)", 1: "(unknown)"}.get(row["city"]) or table[row["city"]] for row in rows]
    tags = read_column(folder, schema, "test", "tags", 50)
    assert [tags.names[code] for code in tags.codes] == [f"{len(row['tags'])} items" for row in rows[:50]]
    price = read_column(folder, schema, "test", "price", len(rows))
    assert "(missing)" in price.names and any(name.startswith("about ") for name in price.names)
    clicked = read_column(folder, schema, "test", "click", len(rows))
    assert clicked.names == ["0", "1"]
    with pytest.raises(UserError, match=r"column 'nothing': the shards of .* do not hold it; they have user, city"):
        read_column(folder, schema, "test", "nothing", 10)


def test_psi_is_what_counting_gives(prepared):
    folder, schema = prepared
    found = {one["column"]: one for one in drift(folder, schema, "test", ["train"])}
    train, test = read_split(folder, schema, "train"), read_split(folder, schema, "test")
    assert set(found) == {*schema.feature_names, "tags (length)"}
    for name, one in found.items():
        key = name.removesuffix(" (length)")
        counts = []
        for rows in (train, test):
            values = [row[key] for row in rows]
            if key == "tags":
                values = [len(v) for v in values] if "length" in name else [item for v in values for item in v]
            counts.append(Counter(values))
        special = [] if "length" in name else [0, *([1] if key in ("user", "city", "day", "tags") else [])]
        ranked = sorted(counts[0], key=lambda i: (-counts[0][i], i))[:BINS]
        bins = list(dict.fromkeys([*special, *ranked]))
        parts = []
        for count in counts:
            rest = {i: n for i, n in count.items() if i not in bins}
            seen = sum(n for i, n in rest.items() if i in counts[0])
            parts.append([*(count[b] for b in bins), seen, sum(rest.values()) - seen])
        kept = [pair for pair in zip(*parts, strict=True) if sum(pair)]
        total, wanted = [sum(part) + 0.5 * len(kept) for part in parts], 0.0
        for pair in kept:
            p, q = ((n + 0.5) / whole for n, whole in zip(pair, total, strict=True))
            wanted += (q - p) * math.log(q / p)
        assert one["psi"] == pytest.approx(wanted), name
    assert found["city"]["unknown"] == pytest.approx(sum(row["city"] == 1 for row in test) / len(test))
    # The day is a feature here, and no day of the test is one of training; so it is with the number of a row.
    assert set(list(found)[:2]) == {"day", "uid"} and found["day"]["unknown"] == 1.0 and found["user"]["psi"] < 1
    assert psi(np.array([10, 20]), np.array([10, 20])) == 0.0


def test_the_psi_of_no_drift_is_its_noise():
    rng = np.random.default_rng(0)
    values = [psi(rng.multinomial(4000, [0.05] * 20), rng.multinomial(1000, [0.05] * 20)) for _ in range(200)]
    assert np.mean(values) == pytest.approx(19 * (1 / 4000 + 1 / 1000), rel=0.1)
