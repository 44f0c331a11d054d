"""Opens one input file as a lazy DuckDB table, and finds what is wrong with its first bad row."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local
from ssr_rec.data.preparation.engine import Source
from ssr_rec.data.preparation.spec import TextFormat

_SQL_TYPES = {"float64": "DOUBLE", "string": "VARCHAR"}


def text_table(connection: Backend, path: Path, types: dict[str, str], form: TextFormat, delimiter: str) -> Table:
    """Return a CSV or TSV file, plain or gzip, as a lazy table; empty means null.

    Args:
        types: float64 or string for every column, in file order.
    """
    _reach(connection, path)
    quote = '"' if form.quote else ""
    return connection.read_csv(
        literally(path),
        columns={name: _SQL_TYPES[kind] for name, kind in types.items()},
        header=form.header,
        delim=delimiter,
        quote=quote,
        escape=quote,
        nullstr="",
        auto_detect=False,
        hive_partitioning=False,
    )


def parquet_table(connection: Backend, path: Path) -> Table:
    """Return a parquet file as a lazy table.

    Raises:
        UserError: not a complete parquet file.
    """
    _reach(connection, path)
    try:
        return connection.read_parquet(literally(path), hive_partitioning=False)
    except duckdb.Error as error:
        raise UserError(f"{path}: cannot be read as parquet, is it complete? {first_line(error)}") from None


def literally(path: Path) -> str:
    """Return the path for DuckDB, which would take ``[``, ``*`` and ``?`` in it for a pattern and read other files."""
    return re.sub(r"[\[*?]", r"[\g<0>]", str(path))


def _reach(connection: Backend, path: Path) -> None:
    """Let DuckDB read files of the kind of ``path``."""
    if not is_local(path) and path.protocol not in connection.con.list_filesystems():  # type: ignore[attr-defined]
        connection.con.register_filesystem(path.fs)  # type: ignore[attr-defined]


def first_rejected(
    connection: Backend, path: Path, types: dict[str, str], form: TextFormat, delimiter: str
) -> tuple[int, str | None, str, str] | None:
    """Return the first row that does not parse: (row from 1, column, what is wrong, the line); None if all do.

    Read in a second pass, only after the first failed.
    """
    quote = '"' if form.quote else ""
    columns = {name: _SQL_TYPES[kind] for name, kind in types.items()}
    try:
        connection.con.execute(
            "select count(columns(*)) from read_csv($path, columns=$columns, header=$header, delim=$delim,"
            " quote=$quote, escape=$quote, nullstr='', auto_detect=false, hive_partitioning=false, store_rejects=true)",
            {"path": literally(path), "columns": columns, "header": form.header, "delim": delimiter, "quote": quote},
        ).fetchall()
        found = connection.con.execute(
            "select line, column_name, error_type, csv_line from reject_errors order by line limit 1"
        ).fetchall()
    except duckdb.Error:
        return None
    return (found[0][0] - form.header, *found[0][1:]) if found else None


def unreadable(source: Source, error: duckdb.Error) -> UserError:
    """Return what to say of a file whose reading ended with ``error``: its first bad row, if that can be found."""
    reason = source.explain()
    return UserError(f"{source.path}: {reason or f'cannot be read, is it complete? {first_line(error)}'}")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
