"""Describes dense columns, raw numbers that no bucket rounds, and vectors of rows; brings them to what a model sees.

Shards hold the raw numbers, null where they are missing. The reader and the encoder of raw rows both call ``scaled``,
so that a number is the same input in training and in serving, to the bit, whichever engine prepared it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings

Scale = Literal["standard", "log"]
MAX_SCALED = 1000.0
"""Of n numbers none is further from the mean than sqrt(n - 1) standard deviations: those fitted on are not clipped."""


class DenseColumn(Settings):
    """Says how a dense column is scaled: ``(t(v) - mean) / std``, clipped to ``MAX_SCALED`` on either side."""

    name: Annotated[str, Field(max_length=1000)]
    scale: Scale = Field(description="standard: t(v) = v; log: t(v) = sign(v) ln(1 + |v|)")
    mean: float = Field(description="of t(v), over the training rows that it was fitted on")
    std: float = Field(gt=0, description="the same rows' standard deviation; 1 where they have one value or none")
    edges: list[float] = Field(min_length=2, description="quantiles of the scaled numbers of these rows, ascending")

    @model_validator(mode="after")
    def _ascending(self) -> DenseColumn:
        if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise UserError(f"dense column {self.name!r}: its edges must rise")
        return self


class RowVector(Settings):
    """Describes a column of vectors, lists of ``dim`` floats as they are; an empty one is missing."""

    name: Annotated[str, Field(max_length=1000)]
    dim: int = Field(ge=1)


class WrongVector(UserError):
    """Is raised for a vector of another length, or with an entry that is missing or not finite, with its row."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row} {problem}")
        self.row, self.problem = row, problem


def stacked(lists: pa.Array, vector: RowVector) -> np.ndarray:
    """Return (n, dim) float32 of lists of numbers, NaN throughout where there is none.

    Raises:
        WrongVector: see there.
    """
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    wrong = (lengths != 0) & (lengths != vector.dim)
    if wrong.any():
        row = int(wrong.argmax())
        raise WrongVector(row, f"holds {lengths[row]} numbers; a vector of {vector.name!r} has {vector.dim}")
    numbers = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.float64)
    with np.errstate(over="ignore"):
        rows = numbers.astype(np.float32).reshape(-1, vector.dim)
    found = np.full((len(lists), vector.dim), np.nan, dtype=np.float32)
    there = np.flatnonzero(lengths)
    odd = ~np.isfinite(rows).all(axis=1)
    if odd.any():
        raise WrongVector(int(there[odd.argmax()]), "holds a number that is missing, infinite or beyond float32")
    found[there] = rows
    return found


def log_or_same(numbers: np.ndarray, scale: Scale) -> np.ndarray:
    """Return t(v) of ``numbers`` (n,) float64."""
    if scale == "standard":
        return numbers
    # Arrow's logarithm is C's, that of numpy depends on the processor.
    logs: np.ndarray = pc.ln(pa.array(np.abs(numbers) + 1.0)).to_numpy(zero_copy_only=False)
    return np.copysign(logs, numbers)


def scaled(numbers: np.ndarray, column: DenseColumn) -> np.ndarray:
    """Return (n,) float32 of raw ``numbers`` (n,) float64; NaN, which is missing, stays NaN."""
    found = (log_or_same(numbers, column.scale) - column.mean) / column.std
    return np.clip(found, -MAX_SCALED, MAX_SCALED).astype(np.float32)
