"""Describes a split of a prepared dataset: its shards, and how common missing and unknown values are in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ssr_rec.common.settings import Settings
from ssr_rec.data.features import InnerPath


class Lookups(Settings):
    """Counts how many of a feature's values, list items counted singly, have the id of missing or of unknown values."""

    total: int = Field(ge=0)
    missing: int = Field(ge=0)
    oov: int = Field(0, ge=0)

    def __add__(self, other: Lookups) -> Lookups:
        return Lookups(total=self.total + other.total, missing=self.missing + other.missing, oov=self.oov + other.oov)

    def share(self, kind: Literal["missing", "oov"]) -> float:
        """Return the share of the values that is ``missing`` or ``oov``; 0 of no values."""
        return getattr(self, kind) / self.total if self.total else 0.0


class Shard(Settings):
    path: InnerPath
    num_rows: int = Field(ge=0)
    footer: str | None = Field(None, description="sha256 of the file's parquet footer; None: written without")
    group_rows: int | None = Field(
        None, ge=1, description="rows of every row group but the last; None: the footer says, as in older datasets"
    )
    content: str | None = Field(None, description="sha256 of its rows; None: as in older datasets")
    lookups: dict[str, Lookups] | None = Field(None, description="while it is made; then the split has the sums")


class Split(Settings):
    num_rows: int = Field(ge=0)
    positive_rate: dict[str, float] = Field(description="per binary label, among the rows that count for it")
    counted: dict[str, int] = Field(
        default_factory=dict, description="per label the rows that count: observed, of a weight above 0; none: all"
    )
    shards: list[Shard]
    lookups: dict[str, Lookups] = Field(default_factory=dict, description="per feature; older datasets have none")
    groups: int | None = Field(None, ge=0, description="groups of ``together`` whose first row is in it")

    def written(self, shards: Sequence[Shard]) -> Split:
        """Return the split with its shards, their ``lookups`` summed up."""
        sums: dict[str, Lookups] = {}
        for shard in shards:
            for name, found in (shard.lookups or {}).items():
                sums[name] = sums[name] + found if name in sums else found
        bare = [shard.model_copy(update={"lookups": None}) for shard in shards]
        rows = sum(shard.num_rows for shard in shards)
        return self.model_copy(update={"num_rows": rows, "shards": bare, "lookups": sums})
