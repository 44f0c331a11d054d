"""Compares the inputs of a split with those of training: the population stability index (PSI) of every column.

``PSI = sum over bins of (q - p) ln(q / p)``, of the shares ``p`` in training and ``q`` in the split; it is 0 where they
are equal. Bins are the ids most frequent in training, the missing value, the unknown value, all other ids of training
together, and all ids that training does not have. Half a row is added to each bin, so that an empty one does not make
it infinite. Even without any drift PSI is not 0: of ``k`` bins, ``n`` rows and ``m`` training rows its mean is about
``(k - 1) (1/n + 1/m)``, which is given as ``noise``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np

from ssr_rec.data.features import Feature
from ssr_rec.data.schema import Schema

BINS = 50
"""Ids with a bin of their own."""


def psi(trained: np.ndarray, here: np.ndarray) -> float:
    """Return the index of counts ``(k,)`` in training and in a split; 0 of fewer than two bins."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (trained, here))
    return float(((q - p) * np.log(q / p)).sum())


def drift(
    folder: Path, schema: Schema, split: str, trained: list[str], memory_limit: str = "1GB"
) -> list[dict[str, Any]]:
    """Return each feature's PSI on a split against training, the largest first; of lists also that of their lengths.

    Args:
        folder: the prepared dataset.
        schema: the features to compare.
        split: whose inputs.
        trained: the splits that were trained on.
        memory_limit: of the engine, which spills to a temporary folder beyond it.

    Returns:
        entries of ``column``, ``psi``, ``noise``, ``unknown`` and ``missing`` (shares of the split's values) and
        ``trained_unknown`` and ``trained_missing``; None where the encoding has no such id.
    """
    paths = [str(folder / shard.path) for name in trained for shard in schema.splits[name].shards]
    own = [str(folder / shard.path) for shard in schema.splits[split].shards]
    new_from = schema.new_from(split)
    found: list[dict[str, Any]] = []
    with (
        TemporaryDirectory() as spill,
        duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": spill}) as engine,
    ):
        for feature in schema.features:
            column = '"' + feature.name.replace('"', '""') + '"'
            ids = f"unnest({column})" if feature.kind == "list" else column
            before = _Counts(engine, paths, ids, feature, None)
            after = _Counts(engine, own, ids, feature, new_from.get(feature.name))
            found.append({"column": feature.name, **before.against(after)})
            if feature.kind == "list":
                before = _Counts(engine, paths, f"len({column})", None, None)
                after = _Counts(engine, own, f"len({column})", None, None)
                found.append({"column": f"{feature.name} (length)", **before.against(after)})
    return sorted(found, key=lambda one: -one["psi"])


class _Counts:
    """Counts the ids of a feature (None: plain numbers) over some shards."""

    def __init__(
        self, engine: duckdb.DuckDBPyConnection, paths: list[str], ids: str, feature: Feature | None, new: int | None
    ) -> None:
        self.special = {
            key: identity
            for key in ("missing", "oov")
            if feature is not None and (identity := getattr(feature.encoding, f"{key}_id", None)) is not None
        }
        shown = "id" if new is None else f"case when id >= {new} then {self.special['oov']} else id end"
        query = (
            f"select {shown} id, count(*) n from (select {ids} id from read_parquet($paths)) "
            "group by all order by n desc, id"
        )
        rows = engine.execute(query, {"paths": paths}).fetchnumpy() if paths else {"id": [], "n": []}
        self.ids, self.counts = np.asarray(rows["id"], dtype=np.int64), np.asarray(rows["n"], dtype=np.int64)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def share(self, key: str) -> float | None:
        """Return the share of missing or unknown values."""
        if key not in self.special:
            return None
        return float(self.of(np.array([self.special[key]]))[0] / self.total) if self.total else 0.0

    def of(self, wanted: np.ndarray) -> np.ndarray:
        """Return the count of each of some distinct ids."""
        order = np.argsort(self.ids)
        places = np.searchsorted(self.ids, wanted, sorter=order)
        inside = np.minimum(places, max(0, len(order) - 1))
        if not len(order):
            return np.zeros(len(wanted), np.int64)
        at = order[inside]
        return np.where(self.ids[at] == wanted, self.counts[at], 0)

    def against(self, other: _Counts) -> dict[str, Any]:
        """Return PSI and shares of the other counts against these, of training."""
        bins = np.array(list(dict.fromkeys([*self.special.values(), *self.ids[:BINS].tolist()])), dtype=np.int64)
        unseen = other.counts[~np.isin(other.ids, np.append(self.ids, bins))].sum()
        in_bins, own_in_bins = self.of(bins), other.of(bins)
        counts = [
            np.append(in_bins, [self.total - in_bins.sum(), 0]),
            np.append(own_in_bins, [other.total - own_in_bins.sum() - unseen, unseen]),
        ]
        used = (counts[0] + counts[1]) > 0
        rows = [max(1, one.total) for one in (self, other)]
        return {
            "psi": psi(counts[0][used], counts[1][used]),
            "noise": float((used.sum() - 1) * (1 / rows[0] + 1 / rows[1])),
            "unknown": other.share("oov"),
            "missing": other.share("missing"),
            "trained_unknown": self.share("oov"),
            "trained_missing": self.share("missing"),
        }
