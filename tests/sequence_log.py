"""A small prepared dataset with two sequences that share vocabularies with single-valued features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ssr_rec.data.event_sequences import EventSequence
from ssr_rec.data.features import Drawn, Feature, LogBuckets
from ssr_rec.data.schema import GROUP_COLUMN, Schema
from ssr_rec.data.shards import arrow_schema, write_shards
from ssr_rec.data.splits import Split

ITEMS, KINDS, LENGTH = 40, 7, 6


def features() -> list[Feature]:
    """User, item and kind; clicked items with kinds and ages; viewed items; tags, of a table of their own."""
    ages = LogBuckets(column="clicked_age", low=0.0, high=5.0, num_buckets=8)

    def listed(name: str, size: int, vocabulary: str | None) -> Feature:
        encoding = Drawn(column="ids")
        return Feature(
            name=name, kind="list", num_embeddings=size, encoding=encoding, max_length=LENGTH, vocabulary=vocabulary
        )

    def single(name: str, size: int, vocabulary: str | None = None) -> Feature:
        encoding = Drawn(column="ids")
        return Feature(name=name, kind="categorical", num_embeddings=size, encoding=encoding, vocabulary=vocabulary)

    return [
        single("user", 25),
        listed("clicked_item", ITEMS, "item"),
        single("item_id", ITEMS, "item"),
        listed("tags", 12, None),
        single("kind_id", KINDS, "kind"),
        listed("clicked_kind", KINDS, "kind"),
        Feature(name="clicked_age", kind="list", num_embeddings=9, encoding=ages, max_length=LENGTH),
        listed("viewed", ITEMS, "item"),
    ]


def write_sequence_log(folder: Path, rows: dict[str, int], rows_in_group: int = 64, seed: int = 0) -> Path:
    """Write the splits of ``rows``; a click is likely where the item's kind is among those clicked before."""
    rng = np.random.default_rng(seed)
    schema = Schema(
        name="sequences",
        dataset_id=f"sequences-{seed}",
        features=features(),
        sequences=[
            EventSequence(name="clicked", features=["clicked_age", "clicked_kind", "clicked_item"], age="clicked_age")
        ],
        labels=["click"],
        group_id="user",
        splits={},
    )
    splits = {}
    for split, num_rows in rows.items():
        lengths = rng.integers(0, LENGTH + 1, num_rows)
        kinds = [rng.integers(0, KINDS, n).tolist() for n in lengths]
        kind, user = rng.integers(0, KINDS, num_rows), rng.integers(0, 25, num_rows)
        seen = np.array([k in one for k, one in zip(kind, kinds, strict=True)])
        batch = pa.RecordBatch.from_pydict(
            {
                "user": user,
                "clicked_item": [rng.integers(0, ITEMS, n).tolist() for n in lengths],
                "item_id": rng.integers(0, ITEMS, num_rows),
                "tags": [rng.integers(0, 12, n).tolist() for n in rng.integers(0, 4, num_rows)],
                "kind_id": kind,
                "clicked_kind": kinds,
                "clicked_age": [np.sort(rng.integers(1, 9, n))[::-1].tolist() for n in lengths],
                "viewed": [rng.integers(0, ITEMS, n).tolist() for n in rng.integers(0, LENGTH + 1, num_rows)],
                "click": (rng.random(num_rows) < 0.2 + 0.6 * seen).astype(np.int8),
                GROUP_COLUMN: user,
            }
        )
        shards = write_shards([batch], arrow_schema(schema), folder, split, rows_in_group)
        rates = {"click": float(batch.column("click").to_numpy().mean())}
        splits[split] = Split(num_rows=num_rows, positive_rate=rates, shards=shards)
    schema.model_copy(update={"splits": splits}).write(folder)
    return folder
