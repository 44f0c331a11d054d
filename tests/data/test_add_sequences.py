"""Days added to a dataset with given sequences and a shared vocabulary: as if they had been there from the start."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from tests.data.test_add import shards
from tests.histories import GIVEN, given_log

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"]
OLD, NEW = DAYS[:2], DAYS[2:]
SPEC: dict[str, Any] = {**GIVEN, "split": {"type": "days", "column": "day"}, "ignore": [], "min_count": 2}


def log_of_days() -> pd.DataFrame:
    """Later days have items, as candidates and in the history, that the first ones had not."""
    log = given_log(400)
    day = np.arange(len(log)) // 100
    log["day"] = [DAYS[number] for number in day]
    log["item"] += 6 * day
    log["watched"] = [[item + 6 * number for item in items] for items, number in zip(log.watched, day, strict=True)]
    return log


def write(log: pd.DataFrame, path: Path) -> list[str]:
    log.to_parquet(path, index=False)
    return [str(path)]


def made(tmp_path: Path, days: list[str], name: str) -> Path:
    log = log_of_days()
    prepare(write(log[log.day.isin(days)], tmp_path / f"{name}.parquet"), tmp_path / name, make_spec(SPEC, "spec"))
    return tmp_path / name


def test_added_days_are_as_if_they_had_been_there(tmp_path: Path) -> None:
    whole, grown, log = made(tmp_path, DAYS, "whole"), made(tmp_path, OLD, "grown"), log_of_days()
    for number, day in enumerate(NEW):
        add(write(log[log.day == day], tmp_path / f"{number}.parquet"), grown)
    assert shards(grown) == shards(whole)
    assert Schema.read(grown).features == Schema.read(whole).features
    assert Schema.read(grown).sequences == Schema.read(whole).sequences
    lines = [line for groups in shards(grown).values() for group in groups for line in group["watched"]]
    assert max(map(len, lines)) == 2 and 1 in {item for line in lines for item in line}, "new items have no id"


@pytest.mark.slow
def test_a_shared_vocabulary_grows_once_for_all_its_columns(tmp_path: Path) -> None:
    """Counted over candidates and kept events of a day, by plain counting; the columns keep one file and one table."""
    folder, log = made(tmp_path, OLD, "data"), log_of_days()
    first = {feature.name: feature for feature in Schema.read(folder).features}["item"]
    ids = dict(pq.read_table(folder / first.encoding.file, columns=["value", "id"]).to_pandas().to_numpy())  # type: ignore[union-attr]
    shutil.copytree(folder, tmp_path / "each")
    add(write(log[log.day.isin(NEW)], tmp_path / "new.parquet"), folder, extend=True)
    schema = Schema.read(folder)
    for day in NEW:
        size = 2 + len(ids)
        assert schema.new_from(day)["item"] == schema.new_from(day)["watched"] == size
        rows = log[log.day == day]
        counts = Counter(str(item) for item in rows["item"])
        counts.update(str(item) for items in rows["watched"] for item in items[-2:])
        fresh = sorted((v for v, n in counts.items() if n >= 2 and v not in ids), key=lambda v: (-counts[v], v))
        assert fresh
        ids |= {value: size + place for place, value in enumerate(fresh)}
        by_row = rows.set_index("row")
        for line in pq.ParquetFile(folder / schema.splits[day].shards[0].path).read().to_pylist():
            row = by_row.loc[line[GROUP_COLUMN]]
            assert line["item"] == ids.get(str(row["item"]), 1)
            assert line["watched"] == [ids.get(str(item), 1) for item in row["watched"][-2:]]
    features = {feature.name: feature for feature in schema.features}
    assert features["item"].encoding.file == features["watched"].encoding.file  # type: ignore[union-attr]
    assert features["item"].num_embeddings == features["watched"].num_embeddings == 2 + len(ids)
    for day in NEW:
        add(write(log[log.day == day], tmp_path / f"{day}.parquet"), tmp_path / "each", extend=True)
    assert shards(tmp_path / "each") == shards(folder)
