"""Count missing and unknown values while scoring, and tell where they are far more common than in training."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ssr_rec.data.features import Feature
from ssr_rec.data.splits import Lookups

FAR = 0.1
"""A share of missing or unknown values this far above or below training's is said."""
ENOUGH = 1000
"""Values of a feature before its shares are compared: a share of them is within .05 of the true one."""


class ValueShares:
    """Counts missing and unknown values by feature since the scorer was opened; threads may share it.

    Args:
        features: those with an id of missing or unknown values are counted.
        trained: counts of the rows that were trained on, per feature; empty for older datasets.
    """

    def __init__(self, features: Sequence[Feature], trained: dict[str, Lookups]) -> None:
        self.trained = trained
        singles = [feature for feature in features if feature.kind != "list"]
        self._singles = [feature.name for feature in singles]
        self._lists = [feature.name for feature in features if feature.kind == "list"]
        self._special = np.array([_special(feature) for feature in singles], dtype=np.int64).reshape(-1, 2)
        self._list_special = [_special(feature) for feature in features if feature.kind == "list"]
        self._counts = np.zeros((len(singles) + len(self._lists), 3), dtype=np.int64)
        self._rows, self._compare_at = 0, ENOUGH
        self._lock = threading.Lock()

    def add(
        self,
        ids: np.ndarray,
        lists: Sequence[tuple[np.ndarray, np.ndarray]],
        of_rows: Sequence[np.ndarray | None] | None = None,
    ) -> bool:
        """Count the ids (S, B) of single-valued features, and those of lists, as ``Encoder.encode`` returns them.

        What rows share counts for each of them.

        Returns:
            whether so many rows have come since the last time that shares are worth comparing.
        """
        new = np.empty_like(self._counts)
        singles = len(self._singles)
        new[:singles, 0] = ids.shape[1]
        for place in (0, 1):
            new[:singles, 1 + place] = np.count_nonzero(ids == self._special[:, place, None], axis=1)
        sharing = of_rows or [None] * len(lists)
        for row, (one, shared, special) in enumerate(zip(lists, sharing, self._list_special, strict=True), singles):
            values, offsets = one
            if shared is None:
                new[row] = [len(values), *(int(np.count_nonzero(values == kind)) for kind in special)]
            else:
                times = np.bincount(shared, minlength=len(offsets) - 1).repeat(np.diff(offsets))
                new[row] = [int(times.sum()), *(int(times[values == kind].sum()) for kind in special)]
        with self._lock:
            self._counts += new
            self._rows += ids.shape[1]
            is_time = self._rows >= self._compare_at
            if is_time:
                self._compare_at = 2 * self._rows
        return is_time

    def counts(self) -> dict[str, Lookups]:
        """Return the counts so far, per feature."""
        with self._lock:
            rows = self._counts.tolist()
        return {
            name: Lookups(total=total, missing=missing, oov=oov)
            for name, (total, missing, oov) in zip((*self._singles, *self._lists), rows, strict=True)
        }

    def far_from_training(self) -> dict[str, str]:
        """Return, for each feature whose values are unlike training's, a sentence that says so."""
        sentences = {}
        for name, found in self.counts().items():
            trained = self.trained.get(name)
            if trained is None or found.total < ENOUGH:
                continue
            for kind, word in (("oov", "unknown"), ("missing", "missing")):
                here, there = found.share(kind), trained.share(kind)  # type: ignore[arg-type]
                if abs(here - there) > FAR:
                    what = f"{here:.1%} of {found.total:,} values are {word}, {there:.1%} in training"
                    sentences[name] = f"{name}: {what}"
                    break
        return sentences


def _special(feature: Feature) -> tuple[int, int]:
    """Return the ids of missing and of unknown values, -1 where there is none."""
    encoding = feature.encoding
    return getattr(encoding, "missing_id", -1), getattr(encoding, "oov_id", -1)
