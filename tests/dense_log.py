"""A small log with raw floats, some missing, and the dataset prepared from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema

SPEC: dict[str, Any] = {
    "name": "floats",
    "labels": ["click"],
    "categorical": ["user"],
    "lists": {"tags": {"max_length": 3}},
    "dense": {"price": "log", "age": "standard", "never": "standard"},
    "dense_bins": 5,
    "min_count": 1,
    "split": {"type": "time", "column": "row", "boundaries": [400, 500]},
}


def frame(rows: int = 600, seed: int = 0) -> pd.DataFrame:
    """Rows whose floats are others in validation and test than in training, and whose clicks depend on them."""
    rng = np.random.default_rng(seed)
    known = rng.normal(size=rows)
    age = known + np.where(np.arange(rows) < 400, 0, 5)
    log = pd.DataFrame(
        {
            "click": (rng.random(rows) < 1 / (1 + np.exp(-3 * known))).astype(np.int64),
            "user": rng.integers(0, 20, rows),
            "tags": [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 4, rows)],
            "price": rng.choice([-1, 1], rows) * np.exp(3 * rng.normal(size=rows)),
            "age": np.where(rng.random(rows) < 0.2, np.nan, age),
            "never": np.full(rows, np.nan),
            "row": np.arange(rows),
        }
    )
    log.loc[3, "price"] = -0.0
    return log


def write_dense(folder: Path, log: pd.DataFrame, **changes: Any) -> Schema:
    """Prepare ``folder/data`` from a log."""
    log.to_parquet(folder / "log.parquet")
    return prepare([str(folder / "log.parquet")], folder / "data", make_spec({**SPEC, **changes}, "test"))
