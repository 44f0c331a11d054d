"""Gives every column its type: as its role wants it, and the same in every file of a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ibis
from ibis.expr import datatypes as dt
from ibis.expr.types import ArrayColumn, Column

from ssr_rec.common.errors import UserError
from ssr_rec.data.item_weights import is_mark
from ssr_rec.data.preparation.engine import OpenSource, Source
from ssr_rec.data.preparation.item_weight_spec import weight_columns
from ssr_rec.data.preparation.item_weights import cut_out_weights, text_items, typed_weights, without_weights
from ssr_rec.data.preparation.spec import ListColumn, TableSpec

# Not `$`, which in some engines also stands before a last newline.
WHOLE_FLOAT = r"^-?[0-9]+\.0+\z"
"""How pandas writes a whole number of a column in which some are missing."""
ODD_TEXT = r"^$|^(True|TRUE|False|FALSE)$|^-?[0-9]+\.0+$"
"""Text that ``canonical`` changes."""


def as_type(column: Column, kind: dt.DataType | None) -> Column:
    return column if kind is None or column.type() == kind else column.cast(kind)


def common_types(files: Sequence[Path], open_source: OpenSource, spec: TableSpec) -> dict[str, dt.DataType]:
    """Return the type of every column whose type differs between files: what keeps the text of every value.

    Raises:
        UserError: a column of times has several types, which have no order; or what opening a file raises.
    """
    if len(files) == 1:
        return {}
    seen: dict[str, dict[dt.DataType, Path]] = {}
    connection = ibis.duckdb.connect(threads=1)
    try:
        for path in files:
            for name, kind in open_source(connection, path).rows.schema().items():
                seen.setdefault(name, {}).setdefault(kind.copy(nullable=True), path)
    finally:
        connection.disconnect()
    several = {name: kinds for name, kinds in seen.items() if len(kinds) > 1}
    types = {}
    times = {spec.time_column, *(history.order for history in spec.histories.values())}
    for name, kinds in several.items():
        types[name] = _common(list(kinds))
        if name in times and types[name].is_string():
            (one, first), (other, second) = list(kinds.items())[:2]
            raise UserError(
                f"time column {name!r} holds {one} in {first} and {other} in {second}, which have no common order; "
                "convert one of them"
            )
    return types


def _common(kinds: Sequence[dt.DataType]) -> dt.DataType:
    """Return the narrowest type that holds every value of several types with its text."""
    if all(isinstance(kind, dt.Array) for kind in kinds):
        inner = list(dict.fromkeys(kind.value_type.copy(nullable=True) for kind in kinds))
        return dt.Array(inner[0] if len(inner) == 1 else _common(inner))
    if all(kind.is_integer() for kind in kinds):
        return dt.int64
    if all(kind.is_floating() for kind in kinds):
        return dt.float64
    return dt.string


def selected(source: Source, spec: TableSpec) -> Source:
    """Return the columns that ``spec`` uses, typed.

    Raises:
        UserError: a column without a role, a role without a column, or a type that does not fit the role.
    """
    spec.check_columns(source.rows.columns, source.path)
    try:
        columns = {name: typed(source.rows[name], name, spec) for name in spec.used}
        rows = source.rows.select(**columns, **cut_out_weights(source.rows, spec))
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from None
    return replace(source, rows=rows)


def typed(column: Column, name: str, spec: TableSpec) -> Column:
    """Return the column as its role wants it: float64 labels and numbers (NaN is null), text or whole ids, cut lists.

    Raises:
        UserError: the type in the file does not fit the role.
    """
    kind = column.type()
    if _is_nothing(kind):
        return ibis.null(_kind_of_role(name, spec))
    if name in spec.row_vectors:
        return _typed_vectors(column, name)
    if name in weight_columns(spec):
        of_list = next(one for one in spec.lists.values() if one.weights == name)
        return typed_weights(column, name, of_list)
    if name in spec.number_lists:
        return _typed_numbers(column, name, spec.list_columns[name])
    if name in spec.list_columns:
        listed = _typed_list(column, name, spec.list_columns[name])
        # Those of a sequence, and those with weights, are cut once they are known to be aligned.
        own = spec.lists.get(name)
        return cut_list(listed, own) if own is not None and own.weights is None else listed
    if isinstance(kind, dt.Array):
        raise UserError(f"column {name!r} holds lists; name it under lists with a max_length, or ignore it")
    if name in spec.numbers:
        if not (kind.is_numeric() or kind.is_boolean()):
            raise UserError(f"column {name!r} holds {kind}, not numbers; name it under categorical, or convert it")
        number = column.cast("float64")
        # Of a label that must be there, messages say what it is.
        return _nan_is_null(number) if {name} & {*spec.numeric, *spec.dense, *spec.tasks} else number
    if kind.is_floating():
        column = _nan_is_null(column)
    if name in spec.categorical:
        if kind.is_floating():
            return _whole_text(column, name)
        if not _is_id(kind):
            raise UserError(f"categorical column {name!r} holds {kind}; name it under numeric, or convert it to text")
    return canonical(column)


def _is_nothing(kind: dt.DataType) -> bool:
    """Return whether a parquet column, or every list of it, holds no value at all: pandas then writes the type null."""
    return kind.is_null() or (kind.is_unknown() and 'kind="NULL"' in str(kind))


def _kind_of_role(name: str, spec: TableSpec) -> str:
    if name in spec.row_vectors or name in weight_columns(spec):
        return "array<float64>"
    if name in spec.list_columns:
        return "array<float64>" if name in spec.number_lists else "array<string>"
    return "float64" if name in spec.numbers else "string"


def _nan_is_null(number: Column) -> Column:
    return number.isnan().ifelse(ibis.null(number.type()), number)


def _whole_text(column: Column, name: str) -> Column:
    """Return the text of whole numbers that pandas has made floats because some are missing.

    Raises:
        UserError: not whole numbers, or so large that a float does not say which.
    """
    rows = column.name("number").as_table()
    number = rows["number"]
    odd = rows.filter(number.notnull() & ((number != number.floor()) | (number.abs() >= 2**53))).limit(1).to_pyarrow()
    if len(odd):
        raise UserError(
            f"categorical column {name!r} holds {column.type()}, such as {odd['number'][0].as_py()!r}; name it under "
            "numeric, or convert it to text"
        )
    return column.cast("int64").cast("string")


def canonical(column: Column) -> Column:
    """Return a column of ids with one text for what several containers write differently (docs/data.md).

    Empty text is missing; pandas writes booleans as ``True`` and integers with gaps as ``24.0``; unsigned integers may
    be beyond any engine's signed ones, so that their text stands for them.
    """
    kind = column.type()
    if kind.is_unsigned_integer():
        return column.cast("string") if kind.nbytes == 8 else column.cast("int64")
    if not kind.is_string():
        return column
    return ibis.cases(
        (column == "", ibis.null("string")),
        (column.isin(["True", "TRUE"]), ibis.literal("true")),
        (column.isin(["False", "FALSE"]), ibis.literal("false")),
        (column.re_search(WHOLE_FLOAT), column.split(".")[0]),
        else_=column,
    )


def _typed_list(column: Column, name: str, settings: ListColumn) -> Column:
    if settings.weights is not None and is_mark(settings.weights):
        column = without_weights(text_items(column, name, settings), settings.weights)
    kind = column.type()
    if kind.is_string():
        if settings.separator is None:
            raise UserError(
                f"list column {name!r} holds text; give its separator, as in lists: {{{name}: {{separator: '|'}}}}, or "
                "name it under categorical"
            )
        # Empty text is a list of nothing, not of one empty item.
        column = column.nullif("").split(settings.separator)
    elif not isinstance(kind, dt.Array):
        raise UserError(f"list column {name!r} holds {kind}, not lists; name it under categorical or numeric")
    elif not _is_id(kind.value_type):
        raise UserError(f"list column {name!r} holds lists of {kind.value_type}; items must be text or whole numbers")
    elif kind.value_type.is_unsigned_integer():
        column = column.cast("array<string>" if kind.value_type.nbytes == 8 else "array<int64>")
    return column.map(canonical) if column.type().value_type.is_string() else column


def _typed_numbers(column: Column, name: str, settings: ListColumn) -> Column:
    kind = column.type()
    if kind.is_string():
        if settings.separator is None:
            raise UserError(f"list column {name!r} holds text; give its sequence a separator")
        column = column.nullif("").split(settings.separator).map(lambda item: item.nullif("").cast("float64"))
    elif not isinstance(kind, dt.Array) or not (kind.value_type.is_numeric() or kind.value_type.is_boolean()):
        raise UserError(f"list column {name!r} holds {kind}, not lists of numbers")
    return column.cast("array<float64>").map(_nan_is_null)


def _typed_vectors(column: Column, name: str) -> Column:
    kind = column.type()
    if not isinstance(kind, dt.Array) or not kind.value_type.is_numeric():
        raise UserError(f"column {name!r} of row_vectors holds {kind}, not lists of numbers; write them as parquet")
    return column.cast("array<float64>")


def cut_list(column: ArrayColumn, settings: ListColumn) -> ArrayColumn:
    """Return the first, or last, ``max_length`` items."""
    if settings.keep == "first":
        return column[: settings.max_length]
    return column[ibis.greatest(column.length() - settings.max_length, 0) :]


def _is_id(kind: dt.DataType) -> bool:
    # A float has no one text form, and a vocabulary must read the same everywhere.
    return bool(kind.is_string() or kind.is_integer() or kind.is_boolean() or kind.is_date())
