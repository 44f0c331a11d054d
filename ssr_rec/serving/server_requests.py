"""Reads a request's body, JSON or an Arrow IPC stream, and writes its answer; nothing in it names a file or code."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from ssr_rec.common.errors import UserError
from ssr_rec.serving.raw_rows import Encoded
from ssr_rec.serving.scorer import Scorer
from ssr_rec.serving.user_once import encode_user_once

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
RECORD_BATCH, DICTIONARY_BATCH = 3, 2
"""Of the union MessageHeader in Arrow's Message.fbs."""


class TooLarge(UserError):
    """A request has more rows than the server takes."""


class Request(NamedTuple):
    rows: int
    encode: Callable[[Scorer], Encoded]
    """Refuses rows that cannot be read, with a ``UserError`` that names row, feature and value."""


def read_request(kind: str, body: bytes, max_rows: int) -> Request:
    """Return the rows of a body of the media type ``kind``, ``JSON`` or ``ARROW``.

    Raises:
        TooLarge: more than ``max_rows`` rows.
        UserError: not a request; the message says why.
    """
    rows, encode = _read_arrow(body, max_rows) if kind == ARROW else _read_json(body)
    if rows > max_rows:
        raise TooLarge(f"{rows:,} rows: a request has at most {max_rows:,}")
    return Request(rows, encode)


def _read_json(body: bytes) -> Request:
    try:
        # Without a rule of its own, json takes NaN and Infinity, which are no JSON.
        found = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise UserError("the body is nested too deep") from None
    except ValueError as error:
        raise UserError(f"the body is not JSON: {str(error)[:200]}") from None
    if isinstance(found, dict) and set(found) == {"rows"}:
        rows = _list_of_mappings(found["rows"], "rows")
        return Request(len(rows), lambda scorer: scorer.encoder.encode(rows))
    if isinstance(found, dict) and set(found) == {"user", "candidates"}:
        user, candidates = found["user"], _list_of_mappings(found["candidates"], "candidates")
        if not isinstance(user, Mapping):
            raise UserError("user: must be an object of feature names and values")
        return Request(len(candidates), lambda scorer: encode_user_once(scorer.encoder, user, candidates))
    raise UserError('a request is {"rows": [{...}, ...]} or {"user": {...}, "candidates": [{...}, ...]}')


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is no JSON; a missing value is null, or left out")


def _list_of_mappings(found: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(found, list):
        raise UserError(f"{name}: must be a list of objects")
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise UserError(f"{name}: row {number} is not an object of feature names and values")
    return found


def _read_arrow(body: bytes, max_rows: int) -> Request:
    try:
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
            if _is_compressed(message.metadata.to_pybytes()):
                raise UserError("compressed buffers are refused, as a small body could fill the memory")
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            # Names are decoded here, as one that is no text is refused.
            for name, kind in zip(reader.schema.names, reader.schema.types, strict=True):
                if not _is_taken(kind):
                    raise UserError(
                        f"column {name[:100]!r} holds {str(kind)[:100]}; "
                        "a request has numbers, booleans, text, dates and lists of them"
                    )
            table = reader.read_all()
        if table.num_rows <= max_rows:
            # Offsets beyond the body would be read as they are.
            table.validate(full=True)
    except (pa.ArrowException, OSError, struct.error, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"the body is not an Arrow IPC stream: {' '.join(str(error).split())[:200]}") from None
    return Request(table.num_rows, lambda scorer: scorer.encoder.encode(table))


def _is_taken(kind: pa.DataType) -> bool:
    """Return whether a type holds no more than its own bytes: not a few of them many times, as a dictionary may."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        return not types.is_nested(kind.value_type) and _is_taken(kind.value_type)
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_date32(kind)
        or types.is_null(kind)
    )


def _is_compressed(message: bytes) -> bool:
    """Return whether the buffers of an IPC message are compressed: pyarrow has no way to ask before it unpacks them.

    Fields by Arrow's Message.fbs: Message (version, header_type, header, ...), DictionaryBatch (id, data, ...),
    RecordBatch (length, nodes, buffers, compression, ...).
    """
    (root,) = struct.unpack_from("<I", message, 0)
    kind = _field(message, root, 1)
    header = _table(message, root, 2)
    if kind is None or header is None:
        return False
    if message[kind] == DICTIONARY_BATCH:
        header = _table(message, header, 1)
    elif message[kind] != RECORD_BATCH:
        return False
    return header is not None and _field(message, header, 3) is not None


def _field(message: bytes, table: int, number: int) -> int | None:
    """Return where a field of a FlatBuffers table begins, None if it is not there."""
    (back,) = struct.unpack_from("<i", message, table)
    (size,) = struct.unpack_from("<H", message, table - back)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", message, table - back + 4 + 2 * number)
    return table + int(offset) if offset else None


def _table(message: bytes, table: int, number: int) -> int | None:
    at = _field(message, table, number)
    return None if at is None else at + int(struct.unpack_from("<I", message, at)[0])


def write_answer(kind: str, model: str, probabilities: Mapping[str, np.ndarray]) -> bytes:
    """Return probabilities in the form that the request had; a JSON number is the float32 to the bit."""
    if kind == ARROW:
        table = pa.table({f"p_{label}": values for label, values in probabilities.items()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue().to_pybytes())
    values = {label: found.tolist() for label, found in probabilities.items()}
    return json.dumps({"model": model, "probabilities": values}).encode()
