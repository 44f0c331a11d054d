"""Gives vectors that are given by id a table of their own, from which they are trained on as any embedding is.

Such a table has the feature's name and a row an id, as its file has. It is pooled as the others: of one id, its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.data.features import Feature
from ssr_rec.data.given_vectors import stored_vectors
from ssr_rec.data.schema import Schema

ROWS_AT_ONCE = 65_536


def trained_vectors(schema: Schema, config: EmbeddingsConfig) -> list[Feature]:
    """Return the features whose given vectors are trained, in schema order.

    Raises:
        UserError: ``embeddings.trained_vectors`` names what has no vectors by id.
    """
    given = {feature.name: feature for feature in schema.features if feature.vectors is not None}
    for name in config.trained_vectors:
        if name not in given:
            known = f"those of {schema.name!r} are {', '.join(given)}" if given else f"{schema.name!r} has none"
            raise UserError(f"embeddings.trained_vectors names {name!r}, which has no vectors given by id; {known}")
    return [feature for name, feature in given.items() if name in config.trained_vectors]


def starting_rows(schema: Schema, config: EmbeddingsConfig, folder: Path | None) -> dict[str, np.ndarray]:
    """Return table -> the vectors (num_embeddings, E) that its rows begin with.

    Args:
        folder: the dataset; None where no vectors are trained.

    Raises:
        UserError: as ``stored_vectors``; or an entry that the table's precision cannot hold.
    """
    found = {}
    for feature in trained_vectors(schema, config):
        assert folder is not None, "a model of given vectors needs the dataset that has them"
        found[feature.name] = rows = stored_vectors(feature, folder)
        if config.dtype_of(feature.name) == "fp16":
            for block in _blocks(rows):
                if (most := float(np.abs(block).max())) > torch.finfo(torch.float16).max:
                    raise UserError(
                        f"embeddings.dtype: vectors {feature.name!r} have an entry of {most:g}, which fp16 cannot "
                        f'hold; set --embeddings.dtypes={{"{feature.name}": fp32}}, or scale them and prepare anew'
                    )
    return found


def copy_rows(shard: Tensor, vectors: np.ndarray, first_row: int, first_column: int) -> None:
    """Fill a shard of a table with the vectors of its rows; columns beyond a vector's end are 0."""
    rows, columns = shard.shape
    wanted = vectors[first_row : first_row + rows, first_column : first_column + columns]
    start = 0
    for block in _blocks(wanted):
        shard[start : start + len(block), : block.shape[1]].copy_(torch.from_numpy(block))
        start += len(block)
    shard[:, wanted.shape[1] :] = 0


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield copies of the rows in memory, some at a time."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield np.array(rows[start : start + ROWS_AT_ONCE])


def refuse_given(key: str, name: str, schema: Schema, trained: Mapping[str, object]) -> None:
    """Refuse a setting of tables that names given vectors for which it is not.

    Raises:
        UserError: naming the key and the fix.
    """
    given = {feature.name: feature.vectors for feature in schema.features if feature.vectors is not None}
    if name in given:
        fix = "vectors that are trained have dtypes alone, not dims or managed rows"
        if name not in trained:
            fix = "they have a table where embeddings.trained_vectors names them"
        raise UserError(f"embeddings.{key} names {name!r}, whose vectors of {given[name].dim} are given; {fix}")
