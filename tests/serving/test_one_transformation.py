"""A log prepared from one container and scored from another has the same ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema
from ssr_rec.serving.raw_columns import Rows
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.score_file import _pieces
from tests.cases import one_quick

SPEC = {
    "name": "x",
    "labels": ["click"],
    "categorical": ["flag", "whole", "gaps", "text", "words"],
    "numeric": ["price"],
    "lists": {"tags": {"max_length": 2, "separator": "|", "keep": "last"}},
    "min_count": 2,
    "hash_buckets": {"words": 50},
}


NA = {"keep_default_na": False, "na_values": [""]}
"""By default pandas takes words such as None for missing."""


def draw(seed: int, rows: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "flag": rng.integers(0, 2, rows).astype(bool),
            "whole": rng.integers(-5, 20, rows),
            "gaps": np.where(rng.random(rows) < 0.3, np.nan, rng.integers(0, 9, rows)),
            "text": rng.choice(["", "a", "b c", "two\nlines", 'a "quote"', "Ü, x", "None"], rows),
            "words": rng.choice(["True", "x", "7.0", ""], rows),
            "price": np.where(rng.random(rows) < 0.2, np.nan, rng.exponential(10, rows)),
            "tags": rng.choice(["", "a", "a|b", "a|b|c", "a||True", "7.0|False", "7|true"], rows),
        }
    )


def ways_to_score(folder: Path, frame: pd.DataFrame, schema: Schema) -> Iterator[tuple[str, list[Rows]]]:
    names = [feature.encoding.column for feature in schema.features]
    yield "csv", list(_pieces(folder / "log.csv", schema, names))
    yield "parquet", list(_pieces(folder / "log.parquet", schema, names))
    yield "parquet path", [folder / "log.parquet"]
    yield "frame", [frame]
    yield "frame read from csv", [pd.read_csv(folder / "log.csv", **NA)]
    yield "frame of text", [pd.read_csv(folder / "log.csv", dtype=dict.fromkeys(SPEC["categorical"], str), **NA)]
    yield "mappings", [frame.to_dict("records")]
    yield (
        "mappings without what is missing",
        [[{k: v for k, v in row.items() if v != "" and v == v} for row in frame.to_dict("records")]],
    )


@pytest.mark.parametrize("seed", one_quick(*range(3)))
@pytest.mark.parametrize("container", ["csv", "parquet"])
def test_what_is_prepared_is_what_is_scored(tmp_path, container, seed):
    frame = draw(seed)
    frame.to_csv(tmp_path / "log.csv", index=False)
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    spec = make_spec(SPEC, "spec")
    schema = prepare([str(tmp_path / f"log.{container}")], tmp_path / "out", spec)
    stored: Counter = Counter()
    for split in schema.splits.values():
        for shard in split.shards:
            rows = pq.read_table(tmp_path / "out" / shard.path, columns=schema.feature_names).to_pylist()
            stored.update(tuple(tuple(v) if isinstance(v, list) else v for v in row.values()) for row in rows)
    encoder = Encoder(schema, tmp_path / "out")
    for way, pieces in ways_to_score(tmp_path, frame, schema):
        scored: Counter = Counter()
        for piece in pieces:
            encoded = encoder.encode(piece)
            lists = [np.split(ids, offsets[1:-1]) for ids, offsets in encoded.lists]
            for row in range(encoded.ids.shape[1]):
                scored[tuple(encoded.ids[:, row].tolist()) + tuple(tuple(part[row].tolist()) for part in lists)] += 1
        assert scored == stored, way
