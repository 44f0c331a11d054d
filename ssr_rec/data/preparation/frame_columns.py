"""Makes the spec of a DataFrame, guessing the kind of every column that nobody named, and writes the frame as a log."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api import types

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.spec import TableSpec, listed, make_spec, nearest

ROWS_AT_ONCE = 2**16
ENOUGH_ROWS = 100
"""A smaller frame does not say whether a column has a value of its own in every row."""
OWN_VALUE = 0.95
"""Share of distinct values from which a text column names rows and says nothing about them."""
MANY_VALUES = 0.5
"""Share of distinct values from which whole numbers are taken for an amount."""
MAX_GUESSED_LENGTH = 50
KINDS = ("categorical", "numeric", "lists", "ignore")


@dataclass(frozen=True)
class FrameSpec:
    """Holds the spec of a frame, and why the columns that were guessed are what they are.

    Attributes:
        reasons: column -> reason, of every guessed column in the frame's order.
    """

    spec: TableSpec
    reasons: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the kinds of all columns, a line each; guessed ones with an asterisk and a reason."""
        spec = self.spec
        kinds: dict[str, list[str]] = {
            "labels": spec.labels,
            "categorical": spec.categorical,
            "numeric": spec.numeric,
            "dense": list(spec.dense),
            "lists": list(spec.lists),
            "vectors": list(spec.vectors),
            "sequences": list(spec.sequences),
            "weight": spec.weighted,
            "together": [] if spec.together is None or spec.together in spec.features else [spec.together],
            "ignored": spec.ignore,
        }
        lines = [f"{kind:<12} {', '.join(map(self._marked, names))}" for kind, names in kinds.items() if names]
        if self.reasons:
            lines.append("* guessed: " + "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items()))
            lines.append("name a column under categorical=, numeric=, dense=, lists= or ignore= of fit to correct it")
        return "\n".join(lines)

    def _marked(self, name: str) -> str:
        return f"{name}*" if name in self.reasons else name


def spec_of_frame(frame: pd.DataFrame, entries: Mapping[str, Any]) -> FrameSpec:
    """Return the spec of a frame.

    Args:
        frame: (rows, columns), its columns named by text, each name once.
        entries: of a ``TableSpec``; every column of the frame that they give no role is guessed. ``name`` may be
            left out, and ``lists`` may be names alone.

    Raises:
        UserError: entries that are no spec, or that name a column which the frame does not have.
    """
    wanted = {"name": "frame", **{key: value for key, value in entries.items() if value is not None}}
    if isinstance(lists := wanted.get("lists"), (list, tuple)):
        _refuse_unknown(frame, lists, "lists")
        wanted["lists"] = {name: {"max_length": _longest(frame[name])} for name in lists}
    _refuse_unknown(frame, wanted.get("dense", ()), "dense")
    for kind in ("categorical", "numeric", "ignore"):
        wanted[kind] = list(wanted.get(kind, ()))
        _refuse_unknown(frame, wanted[kind], kind)
    named, helpers = _roles(wanted)
    reasons: dict[str, str] = {}
    for name in frame.columns:
        if name in named:
            continue
        if name == wanted.get("together"):
            continue  # groups such as requests do not come again, and as a feature would name the rows trained on
        kind, reason = _guess(frame[name], str(name))
        if kind == "ignore" and name in helpers:
            continue  # it has a role already, and one that asks for no feature
        reasons[name] = reason
        if kind == "lists":
            wanted["lists"] = {**wanted.get("lists", {}), name: {"max_length": _longest(frame[name])}}
        else:
            wanted[kind].append(name)
    return FrameSpec(make_spec(wanted, "fit"), reasons)


def _roles(entries: Mapping[str, Any]) -> tuple[set[Any], set[Any]]:
    """Return the columns that entries, not validated yet, give a role, and those that splits and histories go by."""

    def names(of: Any, *keys: str) -> list[Any]:
        found = [of.get(key) for key in keys] if isinstance(of, Mapping) else []
        return [n for one in found for n in (one if isinstance(one, (list, tuple, Mapping)) else [one])]

    named = {*names(entries, "labels", "categorical", "numeric", "dense", "row_vectors", "lists")}
    named |= {*names(entries, "ignore", "weight")}
    lists = entries.get("lists")
    for one in lists.values() if isinstance(lists, Mapping) else ():
        named |= {*names(one, "weights")}
    helpers = {*names(entries, "group_id", "together"), *names(entries.get("split"), "column")}
    sequences = entries.get("sequences")
    for sequence in sequences.values() if isinstance(sequences, Mapping) else ():
        named |= {*names(sequence, "columns", "numeric", "age")}
        if isinstance(sequence, Mapping):
            helpers |= {*names(sequence.get("from_log"), "by", "order")}
    return named, helpers


def _refuse_unknown(frame: pd.DataFrame, names: Any, kind: str) -> None:
    columns = [str(name) for name in frame.columns]
    for name in names:
        if name not in columns:
            raise UserError(f"{kind}: no column {name!r}{nearest(str(name), columns)}; there are {listed(columns)}")


def _guess(column: pd.Series, name: str) -> tuple[str, str]:
    """Return one of ``KINDS``, and why."""
    present = column.dropna()
    if present.empty:
        return "ignore", "it holds nothing"
    first = present.iloc[0]
    if isinstance(first, (list, tuple, np.ndarray)):
        items = pd.Series([item for value in present.head(1000) for item in value])
        if types.is_float_dtype(items):
            return "ignore", "lists of numbers; make it the numeric column of a sequence"
        return "lists", f"lists, of which at most {MAX_GUESSED_LENGTH} items are kept"
    if types.is_datetime64_any_dtype(column.dtype) or isinstance(first, (datetime.datetime, datetime.time)):
        return "ignore", "a time; make a feature of it, such as the hour, or split by it"
    if types.is_bool_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return "categorical", "booleans" if types.is_bool_dtype(column.dtype) else "categories"
    share = present.nunique() / len(present)
    enough = len(present) >= ENOUGH_ROWS
    if types.is_numeric_dtype(column.dtype):
        return _guess_number(column, present, name, share if enough else 0.0)
    if not isinstance(first, (str, bool, int, datetime.date)):
        return "ignore", f"it holds {type(first).__name__}"
    if enough and share > OWN_VALUE:
        return "ignore", "nearly every row has a value of its own"
    return "categorical", "text" if isinstance(first, str) else f"{type(first).__name__} values"


def _guess_number(column: pd.Series, present: pd.Series, name: str, share: float) -> tuple[str, str]:
    whole = types.is_integer_dtype(column.dtype)
    # pandas makes whole numbers floats where some are missing.
    gaps = not whole and len(present) < len(column) and bool((present % 1 == 0).all())
    if not whole and not gaps:
        return "numeric", "decimal numbers"
    if share <= MANY_VALUES or name.lower() == "id" or name.lower().endswith("_id"):
        return "categorical", "whole numbers, taken for ids"
    return "numeric", "whole numbers, most of them distinct"


def _longest(column: pd.Series) -> int:
    return int(np.clip(max((len(value) for value in column.dropna()), default=1), 1, MAX_GUESSED_LENGTH))


def write_frame(frame: pd.DataFrame, path: Path, more: Mapping[str, np.ndarray]) -> None:
    """Write a frame as a parquet file, some rows at a time, so that memory never holds it a second time.

    Args:
        more: further columns (rows,).

    Raises:
        UserError: a column whose values have no one type.
    """
    kinds = pa.schema([pa.field(name, _kind(frame[name], name)) for name in frame.columns])
    further = [pa.field(name, pa.from_numpy_dtype(values.dtype)) for name, values in more.items()]
    with pq.ParquetWriter(path, pa.schema([*kinds, *further])) as writer:
        for start in range(0, max(len(frame), 1), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            try:
                part = pa.Table.from_pandas(frame.iloc[rows], schema=kinds, preserve_index=False)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise UserError(f"rows from {start}: {_in_a_line(error)}; give a column one type") from None
            for one, values in zip(further, more.values(), strict=True):
                part = part.append_column(one, pa.array(values[rows]))
            writer.write_table(part.replace_schema_metadata())


def _kind(column: pd.Series, name: str) -> pa.DataType:
    """Return the type that holds every value of a column."""
    try:
        kind = pa.Schema.from_pandas(column.to_frame(), preserve_index=False).types[0]
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"column {name!r}: {_in_a_line(error)}; give its values one type") from None
    return pa.float32() if pa.types.is_float16(kind) else kind


def _in_a_line(error: Exception) -> str:
    return " ".join(" ".join(map(str, error.args)).split())[:300]
