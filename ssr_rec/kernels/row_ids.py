"""Turns whole rows into ids in C++: dicts by Python's own objects, record batches by Arrow's C data interface.

Common types are read alone; ``ssr_rec.serving.raw_rows`` reads all others, and says what is wrong with a value.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int64, c_void_p, py_object
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from ssr_rec.kernels import extension
from ssr_rec.kernels.value_ids import BucketIds, TextIds

SCHEMA_BYTES, ARRAY_BYTES = 72, 80
"""Of ``ArrowSchema`` and ``ArrowArray`` where a pointer has 8 bytes."""


class Floats(NamedTuple):
    """Says that numbers are read as they are."""


FLOATS = Floats()


class FieldOfRow(NamedTuple):
    """Describes one feature.

    Attributes:
        column: the key of a dict, or the name of a column.
        to: what gives ids to its values; None for ids that were drawn; ``FLOATS`` for numbers, whose "ids" are the bits
            of float64, NaN where they are missing.
        size: ids that were drawn are below it.
        max_length: items that are kept of a list; None for a single value.
        keeps_last: the last ones rather than the first.
    """

    column: str
    to: TextIds | BucketIds | Floats | None
    size: int
    max_length: int | None
    keeps_last: bool = False


class _Field(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("column", "to")),
        *((name, c_int64) for name in ("kind", "size", "is_list", "max_length", "keeps_last")),
    ]


class RowIds:
    """Gives ids to rows of dicts and to record batches; ``columns`` must outlive no change of the fields."""

    def __init__(self, fields: Sequence[FieldOfRow]) -> None:
        self.fields = list(fields)
        self._names = [field.column for field in fields]
        self._of_dicts = (_Field * len(fields))(*(_c_field(field, id(field.column)) for field in fields))
        self._is_list = [field.max_length is not None for field in fields]
        self._most = np.array([field.max_length for field in fields if field.max_length is not None], np.int64)
        self._of_batches: tuple[list[str], Any] = ([], None)

    def of_dicts(self, rows: list[Any]) -> RowsOfIds | None:
        """Return the ids of a list of dicts, in which a key that is not there is missing; None for other values."""
        python = _python()
        rows = list(rows)  # no other thread appends to this one
        return self._ids(
            len(rows), python.ssr_rec_lengths_of_dicts, python.ssr_rec_ids_of_dicts, (rows, self._of_dicts)
        )

    def of_batch(self, batch: pa.RecordBatch) -> RowsOfIds | None:
        """Return the ids of a record batch, which has each column once; None for other types or values."""
        names = batch.schema.names
        known, fields = self._of_batches  # at once: another thread may have columns in another order
        if names != known:
            place = {name: at for at, name in enumerate(names)}
            fields = (_Field * len(self.fields))(*(_c_field(field, place[field.column]) for field in self.fields))
            self._of_batches = (names, fields)
        # Zeroed: what is not handed over has nothing to free.
        handed = (ctypes.c_char * (SCHEMA_BYTES + ARRAY_BYTES))()
        schema = ctypes.addressof(handed)
        array = schema + SCHEMA_BYTES
        batch._export_to_c(array, schema)
        plain = _plain()
        try:
            given = (schema, array, fields)
            return self._ids(batch.num_rows, plain.ssr_rec_lengths_of_batch, plain.ssr_rec_ids_of_batch, given)
        finally:
            plain.ssr_rec_release_batch(schema, array)

    def _ids(self, rows: int, count: Any, write: Any, given: tuple[Any, ...]) -> RowsOfIds | None:
        lengths = np.empty((len(self._most), rows), np.int64)
        if not count(*given, len(self.fields), lengths.ctypes.data):
            return None
        offsets = np.zeros((len(lengths), rows + 1), np.int64)
        np.cumsum(np.minimum(lengths, self._most[:, None]), axis=1, out=offsets[:, 1:])
        singles = np.empty((len(self.fields) - len(lengths), rows), np.int64)
        lists = [(np.empty(own[-1], np.int64), own) for own in offsets]
        of_lists, of_singles = (ids.ctypes.data for ids, _ in lists), iter(range(len(singles)))
        first = singles.ctypes.data
        addresses = [next(of_lists) if is_list else first + 8 * rows * next(of_singles) for is_list in self._is_list]
        outs = (c_void_p * len(addresses))(*addresses)
        written = write(*given, len(self.fields), lengths.ctypes.data, outs)
        return RowsOfIds(singles, lists, lengths) if written else None


class RowsOfIds(NamedTuple):
    singles: np.ndarray
    """(S, B) int64."""
    lists: list[tuple[np.ndarray, np.ndarray]]
    """Ids (n,) and offsets (B + 1,) of each list, int64."""
    lengths: np.ndarray
    """(L, B) int64: how many items each list was given."""


def _c_field(field: FieldOfRow, column: int) -> _Field:
    kind = 0 if isinstance(field.to, TextIds) else 2 if field.to is None else 3 if field.to == FLOATS else 1
    address = field.to.address if isinstance(field.to, (TextIds, BucketIds)) else None
    is_list = field.max_length is not None
    return _Field(column, address, kind, field.size, is_list, field.max_length or 0, field.keeps_last)


@functools.cache
def _python() -> ctypes.PyDLL:
    library = ctypes.PyDLL(str(extension.build()))  # with the GIL
    library.ssr_rec_lengths_of_dicts.argtypes = [py_object, c_void_p, c_int64, c_void_p]
    library.ssr_rec_ids_of_dicts.argtypes = [py_object, c_void_p, c_int64, c_void_p, c_void_p]
    for function in (library.ssr_rec_lengths_of_dicts, library.ssr_rec_ids_of_dicts):
        function.restype = c_int64
    return library


@functools.cache
def _plain() -> ctypes.CDLL:
    library = ctypes.CDLL(str(extension.build()))
    library.ssr_rec_lengths_of_batch.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]
    library.ssr_rec_ids_of_batch.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
    for function in (library.ssr_rec_lengths_of_batch, library.ssr_rec_ids_of_batch):
        function.restype = c_int64
    library.ssr_rec_release_batch.argtypes = [c_void_p, c_void_p]
    library.ssr_rec_release_batch.restype = None
    return library
