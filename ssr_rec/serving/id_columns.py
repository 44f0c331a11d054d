"""Turns columns of raw values into ids, as ``preparation/encode.py`` tells the engine to.

A column of one common type goes to C++ as it is (``ssr_rec.kernels.value_ids``). What is left, values of several types
or of rare ones, is first brought to text or numbers one by one, by ``raw_values.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import source
from ssr_rec.data.features import LISTED, Drawn, Feature, LogBuckets, RawHash
from ssr_rec.kernels.value_ids import BucketIds, Part, TextIds, ValueIndex, write_ids
from ssr_rec.serving.raw_values import WrongValue, each, is_missing, items_of, number_of, shown, text_of

Column: TypeAlias = Sequence[Any] | pa.Array
NOT_OF_TYPE = (pa.ArrowInvalid, OverflowError, UnicodeEncodeError)
"""Are raised where a Python value does not fit a type of Arrow: a large integer, half of a surrogate pair."""
OF_LISTS = {str: pa.large_string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
"""Python's types whose values are those of one of Arrow's."""


class ToIds(NamedTuple):
    """Says how the values of a feature, or the items of a list feature, become ids."""

    to: TextIds | BucketIds | None
    """None for ids that were drawn."""
    form: Callable[[Any], Any]
    """Of one value: bytes of text, float or id; None for missing.

    Raises:
        UserError: a value of the wrong type; what it holds, to follow ``row 3: feature 'x' ``.
    """

    @property
    def is_number(self) -> bool:
        return isinstance(self.to, BucketIds)


def make_to_ids(
    features: Sequence[Feature], folder: Path, is_canonical: bool = True, files: Collection[str] = ()
) -> list[ToIds]:
    """Return the encoding of each feature, or of the items of a list feature.

    Args:
        folder: of the artifact, or of the prepared dataset, for its vocabularies.
        is_canonical: the preparation gave text its one form, which older datasets do not have.
        files: those in the folder with a checksum. An index that is not among them is not read.

    Raises:
        UserError: ssr_rec's C++ operators are not there.
    """
    indexes: dict[str, ValueIndex] = {}
    made = []
    for feature in features:
        encoding = feature.encoding
        if isinstance(encoding, LogBuckets):
            is_one = encoding.high <= encoding.low
            width = 1.0 if is_one else (encoding.high - encoding.low) / encoding.num_buckets
            count = 0 if is_one else encoding.num_buckets
            buckets = BucketIds(encoding.low, width, count, encoding.missing_id, encoding.first_id)
            made.append(ToIds(buckets, number_of))
        elif isinstance(encoding, Drawn):
            made.append(ToIds(None, _drawn(feature.num_embeddings)))
        elif isinstance(encoding, LISTED):
            if encoding.file not in indexes:
                index = index_folder(Path(encoding.file)).as_posix()
                is_checked = any(name.startswith(f"{index}/") for name in files)
                path = folder / encoding.file
                indexes[encoding.file] = ValueIndex.read(index_folder(path)) if is_checked else make_index(path)
            found = indexes[encoding.file]
            text = TextIds("vocabulary", encoding.missing_id, encoding.oov_id, is_canonical, found)
            made.append(ToIds(text, _bytes_that_may_be_unknown))
        elif isinstance(encoding, RawHash):
            made.append(ToIds(TextIds("raw_hash", encoding.missing_id, 1, is_canonical), _bytes_to_hash))
        else:
            first, count = encoding.first_id, encoding.num_buckets
            text = TextIds("hash", encoding.missing_id, first, is_canonical, num_buckets=count)
            made.append(ToIds(text, _bytes_to_hash))
    return made


def index_folder(path: Path) -> Path:
    """Return where the index of a vocabulary's file is, in an artifact."""
    return path.with_suffix(".index")


def make_index(path: Path) -> ValueIndex:
    """Make the index of a vocabulary's file, in memory."""
    table = pq.read_table(source(path), columns=["value", "id"])
    return ValueIndex(table["value"], table["id"].to_numpy())


def write_columns(to_ids: Sequence[ToIds], columns: Sequence[Column], outs: Sequence[np.ndarray]) -> None:
    """Write the ids of each column to its array (n,) int64, which is contiguous.

    Raises:
        WrongValue: a value of the wrong type, with the column's place.
    """
    parts: dict[int, Part] = {}
    for place, (to, column) in enumerate(zip(to_ids, columns, strict=True)):
        with _in_column(place):
            if to.to is None:
                _write_drawn(column, to, outs[place])
            else:
                parts[place] = Part.of(_plain(column, to))
    order = list(parts)
    used = [to for to in (to_ids[place].to for place in order) if to is not None]
    wrong = write_ids(used, list(parts.values()), [outs[place].ctypes.data for place in order])
    if wrong is not None:
        place, row = order[wrong[0]], wrong[1]
        part = parts[place]
        with _in_column(place):
            each([None] * row + [part.array[part.first - part.array.offset + row].as_py()], to_ids[place].form)


def numbers_of(column: Column, finite: bool = True) -> np.ndarray:
    """Return a column of numbers as (n,) float64, NaN where missing.

    Args:
        finite: refuse infinite ones, of whatever type; else those of one common type are left to the caller.

    Raises:
        WrongValue: a value that is no number, or not finite.
    """
    plain = _plain(column, ToIds(None, number_of), True)
    numbers: np.ndarray = plain.to_numpy(zero_copy_only=False).astype(np.float64)
    if finite and np.isinf(numbers).any():
        each(numbers.tolist(), number_of)
    return numbers


def lists_of(column: Column) -> pa.Array:
    """Return a column of lists of numbers as an array of lists of float64, null where missing.

    Raises:
        WrongValue: a value that is no list of numbers.
    """
    wanted, types = pa.large_list(pa.float64()), pa.types
    if isinstance(column, pa.Array):
        kind = column.type
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if is_list and (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
            return column.cast(wanted)
        column = column.to_pylist()
    return pa.array(each(column, _numbers_of_list), wanted)


def _numbers_of_list(value: Any) -> list[float | None] | None:
    return None if is_missing(value) else [number_of(item) for item in items_of(value, None)]


@contextmanager
def _in_column(place: int) -> Iterator[None]:
    try:
        yield
    except WrongValue as error:
        error.column = place
        raise


def _bytes_that_may_be_unknown(value: Any) -> bytes | None:
    text = text_of(value)
    # Half of a surrogate pair is no text, so that no vocabulary has these bytes.
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _bytes_to_hash(value: Any) -> bytes | None:
    text = text_of(value)
    try:
        return None if text is None else text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half of a surrogate pair, which is no text") from None


def _drawn(size: int) -> Callable[[Any], int]:
    def id_of(value: Any) -> int:
        text = text_of(value)
        if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) >= size:
            raise UserError(f"holds {shown(value)}; it was drawn as ids, which are whole numbers from 0 to {size - 1}")
        return int(text)

    return id_of


def _write_drawn(column: Column, to: ToIds, out: np.ndarray) -> None:
    if not isinstance(column, pa.Array):
        out[:] = each(column, to.form)
    elif not pa.types.is_integer(column.type):
        out[:] = each(column.to_pylist(), to.form)
    else:
        # Each distinct value once, in the order in which they come: Python reads them one by one.
        encoded = column.dictionary_encode(null_encoding="encode")
        places = encoded.indices.to_numpy()
        try:
            out[:] = np.array(each(encoded.dictionary.to_pylist(), to.form), np.int64)[places]
        except WrongValue as error:
            raise WrongValue(int(np.argmax(places == error.row)), error.problem) from None


def _type_of(column: Sequence[Any]) -> pa.DataType | None:
    """Return Arrow's type of the values of a list, None where they have several that are not one."""
    kinds = set(map(type, column))
    kinds.discard(type(None))
    if len(kinds) == 1:
        return OF_LISTS.get(kinds.pop())
    return pa.float64() if kinds == {int, float} else None if kinds else pa.int64()


def _plain(column: Column, to: ToIds, is_number: bool | None = None) -> pa.Array:
    """Return a column as text, bytes of text, int64 or float64.

    Args:
        is_number: None: as ``to`` says.

    Raises:
        WrongValue: a value of the wrong type.
    """
    is_number = to.is_number if is_number is None else is_number
    array: pa.Array | None = column if isinstance(column, pa.Array) else None
    if array is None and (kind := _type_of(column)) is not None:
        with suppress(*NOT_OF_TYPE):
            array = pa.array(column, kind)
    plain = None if array is None else _cast(array, is_number)
    if plain is None:
        values = column.to_pylist() if isinstance(column, pa.Array) else column
        plain = pa.array(each(values, to.form), pa.float64() if is_number else pa.large_binary())
    return plain


def _cast(column: pa.Array, is_number: bool) -> pa.Array | None:
    """Return a column whose values all are text, integers, floats or booleans as text, int64 or float64.

    Args:
        is_number: booleans become int64 rather than text, and text is refused.

    Returns:
        None where it has other values, or integers that do not fit.
    """
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        return _cast(column.dictionary_decode(), is_number)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        wanted = pa.large_string() if types.is_string_view(kind) else kind
    elif types.is_floating(kind):
        wanted = pa.float64()
    elif types.is_integer(kind) or types.is_null(kind):
        wanted = pa.int64()
    elif types.is_boolean(kind):
        wanted = pa.int64() if is_number else pa.large_string()
    else:
        return None
    if is_number and wanted not in (pa.int64(), pa.float64()):
        return None
    try:
        return column if wanted == kind else column.cast(wanted)
    except pa.ArrowInvalid:
        return None
