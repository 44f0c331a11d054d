"""A small log whose items and shops have given vectors."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema

ITEMS, E = [f"i{n}" for n in range(30)], 6
SPEC: dict[str, Any] = {
    "name": "content",
    "labels": ["click"],
    "categorical": ["user", "item", "shop"],
    "vectors": {"text": {"of": "item", "file": ""}, "map": {"of": "shop", "file": "", "without": "zero"}},
    "min_count": 40,  # most items have no id of their own, and a vector all the same
    "split": {"type": "time", "column": "row", "boundaries": [400, 500]},
}
SMALL = ["--over_arch.name=deepfm", "--over_arch.hidden=[16]", "--embeddings.dim=8"]


def vectors() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(len(ITEMS), E)).astype(np.float32)


def rows(count: int = 600) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    item = rng.integers(0, len(ITEMS) - 5, count)
    item[500:] += 5  # items that are new in the test split
    logit = 3 * vectors()[item, 0]
    return pd.DataFrame(
        {
            "click": (rng.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64),
            "user": rng.integers(0, 9, count),
            "item": [None if rng.random() < 0.1 else ITEMS[i] for i in item],
            "shop": rng.integers(0, 6, count),  # 4 and 5 have no vector
            "row": np.arange(count),
        }
    )


def write(folder: Path, table: Any = None, log: pd.DataFrame | None = None, **changes: Any) -> Schema:
    folder.mkdir(exist_ok=True)
    (rows() if log is None else log).to_parquet(folder / "log.parquet")
    if table is None:
        table = {"item": ITEMS[::-1], "vector": vectors()[::-1].tolist()}
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / "text.parquet")
    np.save(folder / "map.npy", np.arange(8, dtype=np.int64).reshape(4, 2))
    entries = {**SPEC, **changes}
    files = {"text": folder / "text.parquet", "map": folder / "map.npy"}
    entries["vectors"] = {
        key: {**one, "file": one["file"] or str(files[key])} for key, one in entries["vectors"].items()
    }
    return prepare([str(folder / "log.parquet")], folder / "data", make_spec(entries, "test"))


def wanted(log: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of every row, zeros where there is none."""
    table = dict(zip(ITEMS, vectors(), strict=True))
    text = np.stack([table.get(item, np.zeros(E, np.float32)) for item in log["item"]])
    place = np.where((log["shop"] < 4).to_numpy()[:, None], np.stack([2 * log["shop"], 2 * log["shop"] + 1], 1), 0)
    return text, place.astype(np.float32)
