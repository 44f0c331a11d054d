"""Small prepared datasets, drawn once per session."""

import os
from pathlib import Path

# Before torch is loaded. Threads of OpenMP that wait for one another spin, and where several processes share the cores
# they spin in the way of those they wait for: a run of two seconds takes ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The glue between an exported program's kernels takes g++ half of an export; its numbers are the kernels'.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import numpy as np
import pyarrow as pa
import pytest

from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from ssr_rec.data.shards import arrow_schema, footer_digest, write_shards
from ssr_rec.data.splits import Split

FEATURES = [
    Feature(name="user", kind="categorical", num_embeddings=50, encoding=Drawn(column="user")),
    Feature(name="history", kind="list", num_embeddings=30, encoding=Drawn(column="history"), max_length=4),
    Feature(name="item", kind="categorical", num_embeddings=30, encoding=Drawn(column="item")),
    Feature(name="price", kind="numeric", num_embeddings=8, encoding=Drawn(column="price")),
    Feature(name="tags", kind="list", num_embeddings=12, encoding=Drawn(column="tags"), max_length=3),
]
ROWS = {"train": 1_003, "validation": 301, "test": 205}


def draw_rows(num_rows: int, rng: np.random.Generator) -> pa.RecordBatch:
    """Rows whose labels depend on user and item, with lists that may be empty; the user is the group."""
    user, item = rng.integers(0, 50, num_rows), rng.integers(0, 30, num_rows)
    odds = np.sin(user) + np.cos(3 * item)
    click = (rng.random(num_rows) < 1 / (1 + np.exp(-2 * odds))).astype(np.int8)
    like = click * (rng.random(num_rows) < 0.5).astype(np.int8)
    return pa.RecordBatch.from_pydict(
        {
            "user": user,
            "history": [rng.integers(0, 30, n).tolist() for n in rng.integers(0, 5, num_rows)],
            "item": item,
            "price": rng.integers(0, 8, num_rows),
            "tags": [rng.integers(0, 12, n).tolist() for n in rng.integers(0, 4, num_rows)],
            "click": click,
            "like": like,
            GROUP_COLUMN: user,
        }
    )


def write_dataset(folder: Path, rows: dict[str, int], rows_in_group: int, seed: int = 0) -> Path:
    """A dataset of the features above."""
    rng = np.random.default_rng(seed)
    schema = Schema(
        name="tiny",
        dataset_id=f"tiny-{seed}",
        features=FEATURES,
        labels=["click", "like"],
        group_id="user",
        splits={},
    )
    splits = {}
    for split, num_rows in rows.items():
        batch = draw_rows(num_rows, rng)
        shards = write_shards([batch], arrow_schema(schema), folder, split, rows_in_group)
        rates = {label: float(np.mean(batch.column(label).to_numpy())) for label in schema.labels} if num_rows else {}
        splits[split] = Split(num_rows=num_rows, positive_rate=rates, shards=shards)
    schema.model_copy(update={"splits": splits}).write(folder)
    return folder


def reseal(folder: Path) -> None:
    """Make the checksums of a dataset fit its shards as they are, so that only their content can be refused."""
    schema = Schema.read(folder)
    splits = {}
    for name, split in schema.splits.items():
        shards = [shard.model_copy(update={"footer": footer_digest(folder / shard.path)}) for shard in split.shards]
        splits[name] = split.model_copy(update={"shards": shards})
    schema.model_copy(update={"splits": splits}).write(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,003 training rows in row groups of 64, 301 and 205 rows to validate and test."""
    return write_dataset(tmp_path_factory.mktemp("tiny") / "data", ROWS, rows_in_group=64)
