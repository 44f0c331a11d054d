"""Reads the vectors that a prepared dataset holds for the ids of a feature."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local
from ssr_rec.data.features import Feature


def stored_vectors(feature: Feature, folder: Path) -> np.ndarray:
    """Return the given vectors (num_embeddings, E) of a feature; of a file on this machine only what is used is read.

    Raises:
        UserError: a file that is not there or not of its shape.
    """
    assert feature.vectors is not None
    path, wanted = folder / feature.vectors.file, (feature.num_embeddings, feature.vectors.dim)
    try:
        if is_local(path):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the vectors of {feature.name!r}: {error}; prepare the log again") from None
    if found.shape != wanted:
        raise UserError(f"{path}: shape {found.shape}, the schema says {wanted}; prepare the log again")
    return found
