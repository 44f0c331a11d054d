"""Turns columns of raw values into ids, in C++ on the buffers of Arrow arrays (``cpu/value_ids.cpp``).

Its functions know text, int64 and float64; ``ssr_rec.serving.raw_values`` brings every other kind of value to these.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_double, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from ssr_rec.common.errors import UserError
from ssr_rec.kernels import extension

MAX_VALUES = 2**32 - 2
"""Of a vocabulary: a slot of its index has 32 bits for the number of a value."""
KINDS = ["vocabulary", "hash", "raw_hash"]
INTEGER, FLOAT = pa.int64().id, pa.float64().id
TEXT, LARGE_TEXT = pa.string().id, pa.large_string().id
BYTES, LARGE_BYTES = pa.binary().id, pa.large_binary().id
TEXTS = {TEXT: 0, LARGE_TEXT: 0, BYTES: 0, LARGE_BYTES: 0, INTEGER: 1, FLOAT: 2}
BUCKETS = {INTEGER: 3, FLOAT: 4}
"""Type of a column -> the function of ``cpu/value_ids.cpp``."""


ARRAYS = ["text", "offsets", "ids"]
NPY_HEADER = 128
"""Bytes, at least."""


class _TextIds(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("text", "offsets", "ids", "slots")),
        *((name, c_int64) for name in ("mask", "values", "text_size")),
        *((name, c_int64) for name in ("kind", "is_canonical", "missing", "other", "num_buckets")),
    ]


class _Buckets(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_double) for name in ("low", "width")),
        *((name, c_int64) for name in ("num_buckets", "missing", "first")),
    ]


class ValueIndex:
    """Holds the values of a vocabulary and their ids, and finds them by a hash of their text; features may share it.

    It is four arrays, which ``write`` leaves in a folder and ``read`` maps: the pages that are looked at take memory.

    Args:
        values: text, or its bytes; of equal ones the last counts.
        ids: (n,) int64.

    Raises:
        UserError: the C++ operators are not there, or there are more values than an index can hold.
    """

    def __init__(self, values: pa.Array | pa.ChunkedArray, ids: np.ndarray) -> None:
        if len(values) > MAX_VALUES:
            raise UserError(f"a vocabulary of {len(values):,} values: at most {MAX_VALUES:,} can be looked up")
        whole = pa.concat_arrays([*_chunks(values), pa.array([], values.type)]).cast(pa.large_binary())
        _, offsets, text = whole.buffers()
        self.offsets = np.frombuffer(offsets, np.int64, len(whole) + 1, whole.offset * 8)
        self.text = np.frombuffer(text if text is not None else b"", np.uint8)
        self.ids = np.ascontiguousarray(ids, dtype=np.int64)
        # At most three of four are taken, so that a look is at one or two.
        self.slots = np.zeros(2 ** max(1, (4 * len(whole) // 3).bit_length()), dtype=np.uint64)
        index = _library().ssr_rec_index_values
        index(_at(self.slots), self.slots.size - 1, _at(self.text), _at(self.offsets), len(whole))

    def write(self, folder: Path) -> None:
        """Write the arrays to a new folder."""
        folder.mkdir(parents=True)
        for name in (*ARRAYS, "slots"):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def read(cls, folder: Path) -> ValueIndex:
        """Map the arrays of a folder that ``write`` left.

        Raises:
            UserError: they are not those of an index of this version. What is damaged within them gives ids of -1, or
                other values' ids: only checksums, which the caller has compared, tell.
        """
        index = cls.__new__(cls)
        try:
            for name in (*ARRAYS, "slots"):
                path = folder / f"{name}.npy"
                # What is empty cannot be mapped.
                mode: Literal["r"] | None = "r" if path.stat().st_size > NPY_HEADER else None
                setattr(index, name, np.load(path, mmap_mode=mode, allow_pickle=False))
            index._check_shapes()
            some = np.unique(np.linspace(0, max(0, len(index.ids) - 1), 8).astype(np.int64))[: len(index.ids)]
            texts = [index.text[index.offsets[at] : index.offsets[at + 1]].tobytes() for at in some]
            found = np.empty(len(some), np.int64)
            part = Part.of(pa.array(texts, pa.large_binary()))
            write_ids([TextIds("vocabulary", -1, -1, False, index)], [part], [_at(found)])
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise UserError(f"{folder}: not an index of values: {error}; export the run again") from None
        # Of values that are there twice the last counts, which may have another id.
        if (found < 0).any():
            raise UserError(f"{folder}: an index of another version; export the run again")
        return index

    def _check_shapes(self) -> None:
        """Refuse arrays that do not belong together.

        Raises:
            UserError: says which.
        """
        kinds = {"text": np.uint8, "offsets": np.int64, "ids": np.int64, "slots": np.uint64}
        for name, kind in kinds.items():
            array = getattr(self, name)
            if array.dtype != kind or array.ndim != 1 or not array.flags.c_contiguous:
                raise UserError(f"{name} is {array.dtype} of {array.shape}")
        slots, values = self.slots.size, self.ids.size
        if slots & (slots - 1) or slots <= values:
            raise UserError(f"{slots} slots for {values} values")
        if self.offsets.size != values + 1 or self.offsets[-1] > self.text.size:
            raise UserError(f"{self.offsets.size} offsets for {values} values of {self.text.size} bytes")


class TextIds:
    """Gives ids to text, and to integers and whole floats by their text.

    Args:
        kind: of ``KINDS``.
        other: the id of unknown values of a vocabulary; of a hash the first one.
        is_canonical: text first gets the one form that preparation gives it (``canonical_text``).
    """

    def __init__(
        self,
        kind: str,
        missing: int,
        other: int,
        is_canonical: bool,
        index: ValueIndex | None = None,
        num_buckets: int = 0,
    ) -> None:
        self.index = index
        arrays = [_at(a) for a in (index.text, index.offsets, index.ids, index.slots)] if index else [None] * 4
        sizes = (index.slots.size - 1, index.ids.size, index.text.size) if index else (0, 0, 0)
        self._c = _TextIds(*arrays, *sizes, KINDS.index(kind), is_canonical, missing, other, num_buckets)
        self.address, self.functions = ctypes.addressof(self._c), TEXTS


class BucketIds:
    """Gives ids of equal-width buckets of ``sign(v) * log1p(|v|)`` to numbers; one bucket if ``num_buckets`` is 0."""

    def __init__(self, low: float, width: float, num_buckets: int, missing: int, first: int) -> None:
        self._c = _Buckets(low, width, num_buckets, missing, first)
        self.address, self.functions = ctypes.addressof(self._c), BUCKETS


class Part(NamedTuple):
    """Names some rows of an Arrow array of text, bytes of text, int64 or float64."""

    array: pa.Array
    addresses: tuple[int, int, int]
    """Of its values, of the offsets of texts, of its nulls; 0 where it has none."""
    first: int
    """In the buffers, which an array may share."""
    rows: int

    @classmethod
    def of(cls, array: pa.Array) -> Part:
        validity, *others = array.buffers()
        data, offsets = others[-1], others[0] if len(others) > 1 else None
        addresses = [buffer.address if buffer is not None else 0 for buffer in (data, offsets, validity)]
        return cls(array, (addresses[0], addresses[1], addresses[2]), array.offset, len(array))


def write_ids(tos: Sequence[TextIds | BucketIds], parts: Sequence[Part], outs: Sequence[int]) -> tuple[int, int] | None:
    """Write the ids of columns, each to the address of its array (n,) int64; null and NaN are missing.

    Returns:
        the first column with a number that is refused, and its row: for ``TextIds`` one that is not whole or beyond
        2^53, for ``BucketIds`` an infinite one. None if there is none.
    """
    jobs: list[int] = []
    for to, (array, addresses, first, rows), out in zip(tos, parts, outs, strict=True):
        kind = array.type.id
        jobs += (to.functions[kind], to.address, *addresses, first, rows, kind in (LARGE_TEXT, LARGE_BYTES), out)
    row = c_int64()
    packed = np.array(jobs, dtype=np.int64)
    job = _library().ssr_rec_write_ids(_at(packed), len(parts), byref(row))
    return None if job < 0 else (job, row.value)


def _chunks(values: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return values.chunks if isinstance(values, pa.ChunkedArray) else [values]


def _at(array: np.ndarray) -> int:
    return int(array.ctypes.data)


@functools.cache
def _library() -> ctypes.CDLL:
    if not extension.load():
        raise UserError("raw values need ssr_rec's C++ operators, which could not be built here; see the warning")
    library = ctypes.CDLL(str(extension.build()))
    library.ssr_rec_index_values.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int64]
    library.ssr_rec_index_values.restype = None
    library.ssr_rec_write_ids.argtypes = [c_void_p, c_int64, c_void_p]
    library.ssr_rec_write_ids.restype = c_int64
    return library
