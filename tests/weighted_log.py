"""A small log of lists whose items have weights, in a column of their own and in the items, and a plain reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema

SPEC: dict[str, Any] = {
    "name": "weighted",
    "labels": ["click"],
    "categorical": ["user", "tag"],
    "lists": {
        "tags": {"max_length": 3, "keep": "last", "weights": "tags_w"},
        "words": {"max_length": 2, "separator": "|", "weights": ":"},
        "plain": {"max_length": 2},
    },
    "vocabularies": {"tagged": ["tags", "tag"]},
    "min_count": 2,
    "split": {"type": "time", "column": "row", "boundaries": [400, 500]},
}


def frame(rows: int = 600, seed: int = 0) -> pd.DataFrame:
    """Rows whose clicks depend on the weight of tag 1 in the row's list."""
    rng = np.random.default_rng(seed)
    tags = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 6, rows)]
    weights = [np.round(rng.exponential(size=len(one)), 3).tolist() for one in tags]
    weights[7], weights[8] = [0.0] * len(tags[7]), [0.0] * len(tags[8])
    share = [
        sum(w for t, w in zip(*one, strict=True) if t < 4) / (sum(one[1]) or 1)
        for one in zip(tags, weights, strict=True)
    ]
    words = [rng.choice(["a", "b:c", "7.0", "", "x y"], n).tolist() for n in rng.integers(0, 4, rows)]
    texts = ["|".join(f"{word}:{rng.choice(['.5', '2', '1e-2', '0', '+3.25'])}" for word in one) for one in words]
    return pd.DataFrame(
        {
            "click": (rng.random(rows) < 1 / (1 + np.exp(4 - 8 * np.array(share)))).astype(np.int64),
            "user": rng.integers(0, 20, rows),
            "tag": rng.integers(0, 12, rows),
            "tags": [None if n % 50 == 3 and not one else one for n, one in enumerate(tags)],
            "tags_w": [None if n % 50 == 3 and not one else one for n, one in enumerate(weights)],
            "words": texts,
            "plain": [rng.integers(0, 5, n).tolist() for n in rng.integers(0, 4, rows)],
            "row": np.arange(rows),
        }
    )


def write_weighted(folder: Path, log: pd.DataFrame | None = None, **changes: Any) -> Schema:
    """Prepare ``folder/data`` from a log."""
    folder.mkdir(exist_ok=True)
    (frame() if log is None else log).to_parquet(folder / "log.parquet")
    return prepare([str(folder / "log.parquet")], folder / "data", make_spec({**SPEC, **changes}, "test"))


def pairs_of(log: pd.DataFrame, name: str) -> list[list[tuple[str, float]]]:
    """Return the kept items of each row with their weights, read in a loop."""
    found: list[list[tuple[str, float]]] = []
    for _, row in log.iterrows():
        if name == "tags":
            items = [] if row["tags"] is None else row["tags"]
            kept = [(str(item), float(w)) for item, w in zip(items, row["tags_w"] or [], strict=True)][-3:]
        else:
            parts = row["words"].split("|") if row["words"] else []
            kept = [
                ("7" if one[:3] == "7.0" else one[: one.rindex(":")], float(one[one.rindex(":") + 1 :]))
                for one in parts
            ][:2]
        found.append(kept)
    return found
