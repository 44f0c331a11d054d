"""Small raw logs whose rows have histories or lists of events, their specs, and how to read what was prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ssr_rec.data.schema import GROUP_COLUMN, Schema

LENGTH = 4
SPEC: dict[str, Any] = {
    "name": "histories",
    "labels": ["click"],
    "categorical": ["user", "item", "kind"],
    "numeric": ["price"],
    "group_id": "row",
    "split": {"type": "random", "ratios": [0.7, 0.15, 0.15]},
    "min_count": 1,
    "num_buckets": 16,
    "sequences": {
        "clicked": {
            "from_log": {
                "by": "user",
                "order": "time",
                "where": "click = 1",
                "columns": ["item", "price", "kind"],
                "age": True,
            },
            "max_length": LENGTH,
        },
        "seen": {"from_log": {"by": "user", "order": "time", "columns": ["item"]}, "max_length": 2},
    },
}


def random_log(seed: int, rows: int = 240) -> pd.DataFrame:
    """Few users and moments, so that times tie within and across users; rows are not in order of time."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "row": np.arange(rows),
            "user": [f"u{n}" for n in rng.integers(0, 7, rows)],
            "item": rng.integers(0, 12, rows),
            "kind": rng.choice(["a", "b", "c"], rows),
            "price": np.round(rng.gamma(2, 20, rows), 1),
            "time": rng.integers(0, 40, rows),
            "click": (rng.random(rows) < 0.5).astype(int),
        }
    )


def write(log: pd.DataFrame, folder: Path, files: int) -> list[str]:
    folder.mkdir(parents=True)
    bounds = np.linspace(0, len(log), files + 1).astype(int)
    for number in range(files):
        part = log.iloc[bounds[number] : bounds[number + 1]]
        part.to_parquet(folder / f"{number}.parquet", index=False)
    return [str(folder / f"{number}.parquet") for number in range(files)]


def raw(encoding: Any, folder: Path) -> dict[int, Any]:
    table = pq.read_table(folder / encoding.file)
    return dict(zip(table["id"].to_pylist(), table["value"].to_pylist(), strict=True))


def decoded(folder: Path) -> dict[int, dict[str, Any]]:
    """Row number, which the specs here take for the group id -> its ids."""
    found = {}
    for split in Schema.read(folder).splits.values():
        for shard in split.shards:
            for line in pq.read_table(folder / shard.path).to_pylist():
                found[line[GROUP_COLUMN]] = line
    return found


GIVEN: dict[str, Any] = {
    "name": "given",
    "labels": ["click"],
    "group_id": "row",
    "categorical": ["item"],
    "lists": {"tags": {"max_length": 2}},
    "vocabularies": {"goods": ["item", "watched"]},
    "sequences": {"watched": {"columns": ["watched", "shop"], "numeric": ["spent"], "age": "ages", "max_length": 2}},
    "min_count": 1,
    "num_buckets": 8,
}


def given_log(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, rows)
    return pd.DataFrame(
        {
            "row": np.arange(rows),
            "item": rng.integers(0, 9, rows),
            "tags": [rng.integers(0, 5, 3).tolist() for _ in range(rows)],
            "watched": [rng.integers(5, 14, n).tolist() for n in counts],
            "shop": [rng.choice(["x", "y"], n).tolist() for n in counts],
            "spent": [[None if v < -9 else v for v in rng.normal(0, 9, n).tolist()] for n in counts],
            "ages": [np.sort(rng.integers(0, 99, n))[::-1].astype(float).tolist() for n in counts],
            "click": rng.integers(0, 2, rows),
        }
    )
