"""Describes and reads vectors that are given by value: of an item, say, what a model of its text or picture made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings

if TYPE_CHECKING:
    from ssr_rec.data.preparation.spec import TableSpec

VECTOR = "vector"
"""Column of a parquet file of vectors, beside that of the values."""
RESERVED = 2
"""Rows before the first value's: of missing values and of those without a vector, all zeros."""
MAX_DIM = 65_536


class VectorSpec(Settings):
    """Says which column's values have vectors, and where these are."""

    of: str = Field(description="categorical column whose values have them")
    file: str = Field(description="parquet with that column and one named vector, or npy (n, E) for 0 to n - 1")
    without: Literal["refuse", "zero"] = Field(
        "refuse", description="what a value of the log without a vector is: an error, or zeros, as missing ones are"
    )


def read_vectors(name: str, spec: VectorSpec) -> tuple[pa.Array, np.ndarray]:
    """Return the values (n,), text, and vectors (n, E) float32 of a file.

    Raises:
        UserError: no such file or not of its form, a value twice, or a vector of another length or with an entry that
            is not finite; the message names file and value.
    """
    path = Path(spec.file)
    where = f"vectors.{name}: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    values, vectors = _of_npy(path, where) if path.suffix == ".npy" else _of_parquet(path, spec.of, where)
    if not len(vectors) or not 1 <= vectors.shape[1] <= MAX_DIM:
        raise UserError(f"{where}: vectors of shape {vectors.shape}; give at least one, of 1 to {MAX_DIM} entries")
    wrong = ~np.isfinite(vectors).all(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        entry = vectors[row][~np.isfinite(vectors[row])][0]
        raise UserError(f"{where}: the vector of {values[row].as_py()!r} holds {entry}; its entries must be finite")
    return values, vectors


def _of_npy(path: Path, where: str) -> tuple[pa.Array, np.ndarray]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{where}: not an npy file of numbers: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise UserError(f"{where}: not an npy file of (n, E) numbers")
    return pa.array(np.arange(len(found))).cast(pa.string()), found.astype(np.float32)


def _of_parquet(path: Path, column: str, where: str) -> tuple[pa.Array, np.ndarray]:
    try:
        file = pq.ParquetFile(path)
        for name in (column, VECTOR):
            if name not in file.schema_arrow.names:
                raise UserError(f"{where}: no column {name!r}; it must have {column!r} and {VECTOR!r}")
        table = file.read(columns=[column, VECTOR])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: not a parquet file: {' '.join(str(error).split())[:200]}") from None
    values, lists = table[column].combine_chunks(), table[VECTOR].combine_chunks()
    if not any(is_kind(values.type) for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        raise UserError(f"{where}: column {column!r} holds {values.type}; give whole numbers or text")
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(lists.type) for is_kind in kinds) or not _is_number(lists.type.value_type):
        raise UserError(f"{where}: column {VECTOR!r} holds {lists.type}, not lists of numbers")
    texts = values.cast(pa.string())
    if texts.null_count:
        raise UserError(f"{where}: column {column!r} is missing in row {_first(texts.is_null())}")
    counts = texts.value_counts()
    if len(counts) < len(texts):
        again = counts.field("values")[int(np.argmax(counts.field("counts").to_numpy()))]
        raise UserError(f"{where}: {again.as_py()!r} is there more than once; give it one vector")
    return texts, _stacked(lists.to_pylist(), texts, where)


def _stacked(lists: Sequence[Sequence[float] | None], values: pa.Array, where: str) -> np.ndarray:
    """Return (n, E) float32 of lists of one length.

    Raises:
        UserError: one is missing, has a missing entry or another length than the first.
    """
    length = len(lists[0] or ()) if lists else 0
    for vector, value in zip(lists, values, strict=True):
        if vector is None or len(vector) != length:
            has = "no vector" if vector is None else f"a vector of {len(vector)}"
            raise UserError(f"{where}: {value.as_py()!r} has {has}, the first value one of {length} entries")
    return np.array(lists, dtype=np.float32).reshape(len(lists), length)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _first(mask: pa.Array) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))


def check_vector_specs(spec: TableSpec) -> None:
    """Refuse vectors of no categorical column, or of the name of something else.

    Raises:
        UserError: naming the entry and the fix.
    """
    taken = {*spec.labels, *spec.categorical, *spec.numeric, *spec.dense, *spec.row_vectors}
    taken |= {*spec.list_columns, *spec.ignore, *spec.made}
    for name, given in spec.vectors.items():
        if given.of not in spec.categorical:
            raise UserError(f"vectors.{name}.of: {given.of!r} is not categorical, so it has no values to look up")
        if name in taken:
            raise UserError(f"vectors.{name}: there is a column of that name; choose another")
