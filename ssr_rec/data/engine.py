"""All that is DuckDB's own in the preparation: reading files, numbering rows, spilling, streaming out.

The rest of the pipeline is Ibis expressions; another engine (Spark) needs a twin of this file only.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from ssr_rec.data.table_spec import TextFormat

ROW = "__row__"
"""Position of a row over all input files in the order given, from 0."""

STAGED_SHARE = 5
"""Text takes two to three times its size once staged, and joins and sorts need the rest of the memory."""
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SQL_TYPES = {"float64": "DOUBLE", "string": "VARCHAR"}


@contextmanager
def connect(spill: Path, memory_limit: str, threads: int | None, files: Sequence[Path]) -> Iterator[Backend]:
    """An engine that keeps at most ``memory_limit`` (such as ``4GB``) and spills the rest to ``spill``.

    Args:
        files: what it will read; their size decides whether staged text is compressed.

    Raises:
        ValueError: the limit is not a size, or the work does not fit it even with spilling.
    """
    settings = {"memory_limit": memory_limit, "temp_directory": str(spill), "autoinstall_known_extensions": False}
    if threads is not None:
        settings["threads"] = threads
    try:
        connection = ibis.duckdb.connect(**settings)
    except duckdb.Error as error:
        raise ValueError(f"--memory-limit {memory_limit}, --threads {threads}: {first_line(error)}") from None
    try:
        # Compression makes staged text about ten times smaller, so much less of it ever spills; where nothing will,
        # it only costs time, about a tenth of the whole preparation.
        limit = connection.con.execute("select current_setting('memory_limit')").fetchall()[0][0]
        text = sum(path.stat().st_size * (8 if path.suffix == ".gz" else 1) for path in files)
        compress = "(compress)" if text > _bytes(limit) / STAGED_SHARE else ""
        _execute(connection, f"attach ':memory:' as staged {compress}")
        _execute(connection, "use staged")
        yield connection
    except duckdb.OutOfMemoryException as error:
        raise ValueError(f"--memory-limit {memory_limit} is too small: {first_line(error)}") from None
    finally:
        connection.disconnect()
        shutil.rmtree(spill, ignore_errors=True)


def read_text(connection: Backend, path: Path, types: dict[str, str], form: TextFormat, delimiter: str) -> Table:
    """A CSV or TSV file, plain or gzip, as a lazy table; empty means null.

    Args:
        types: float64 or string for every column, in file order.
    """
    quote = '"' if form.quote else ""
    return connection.read_csv(
        str(path),
        columns={name: _SQL_TYPES[kind] for name, kind in types.items()},
        header=form.header,
        delim=delimiter,
        quote=quote,
        escape=quote,
        nullstr="",
        auto_detect=False,
    )


def read_parquet(connection: Backend, path: Path) -> Table:
    """A parquet file as a lazy table.

    Raises:
        ValueError: not a complete parquet file.
    """
    try:
        return connection.read_parquet(str(path))
    except duckdb.Error as error:
        raise ValueError(f"{path}: cannot be read as parquet, is it complete? {first_line(error)}") from None


def stage(connection: Backend, name: str, rows: Table, path: Path) -> int:
    """Append the rows of ``path`` to the table ``name`` in file order, making it if need be; returns its row count.

    Raises:
        ValueError: the file is broken, or a value does not fit its column; the message names row and column.
    """
    try:
        if name in staged_tables(connection):
            connection.insert(name, rows)
        else:
            connection.create_table(name, rows)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise ValueError(f"{path}: cannot be read, is it complete? {first_line(error)}") from None
    return int(connection.table(name).count().to_pyarrow().as_py())


def store(connection: Backend, name: str, rows: pa.Table) -> Table:
    """Make a small table of the engine from one in memory."""
    # Not `create_table`: Ibis 12 ends it with a statement that DuckDB 2.0 does not parse.
    connection.con.register("__stored__", rows)
    _execute(connection, f"create table {name} as select * from __stored__")
    connection.con.unregister("__stored__")
    return connection.table(name)


def staged_tables(connection: Backend) -> list[str]:
    # Ibis 12 lists tables through a call that DuckDB 2.0 no longer has.
    return [name for (name,) in connection.con.execute("select table_name from duckdb_tables()").fetchall()]


def first_rejected(
    connection: Backend, path: Path, types: dict[str, str], form: TextFormat, delimiter: str
) -> tuple[int, str | None, str, str] | None:
    """The first row of a text file that does not parse: (row from 1, column, what is wrong, the line); None if all do.

    Read in a second pass, only after the first failed.
    """
    quote = '"' if form.quote else ""
    columns = {name: _SQL_TYPES[kind] for name, kind in types.items()}
    try:
        connection.con.execute(
            "select count(columns(*)) from read_csv($path, columns=$columns, header=$header, delim=$delim,"
            " quote=$quote, escape=$quote, nullstr='', auto_detect=false, store_rejects=true)",
            {"path": str(path), "columns": columns, "header": form.header, "delim": delimiter, "quote": quote},
        ).fetchall()
        found = connection.con.execute(
            "select line, column_name, error_type, csv_line from reject_errors order by line limit 1"
        ).fetchall()
    except duckdb.Error:
        return None
    return (found[0][0] - form.header, *found[0][1:]) if found else None


def numbered(table: Table, columns: Sequence[str]) -> Table:
    """Some columns of a staged table and ``ROW``, unless the table was staged with one."""
    if ROW in table.columns:
        return table.select(ROW, *columns)
    return table.select(*columns, **{ROW: table.rowid()})


def with_column(connection: Backend, table: Table, name: str, rows: Table) -> Table:
    """The staged ``table`` with a further int64 column, computed once: ``name`` of ``rows``, found by ``ROW``."""
    # The name may be qualified; what is staged is in the current schema.
    staged, key = table.get_name().split(".")[-1], ROW if ROW in table.columns else "rowid"
    values = connection.compile(rows.select(ROW, name))
    _execute(connection, f'alter table "{staged}" add column "{name}" bigint')
    _execute(
        connection,
        f'update "{staged}" set "{name}" = found."{name}" from ({values}) found where "{staged}".{key} = found."{ROW}"',
    )
    return connection.table(staged)


def stream(
    connection: Backend, rows: Table, batch_rows: int, columns: pa.Schema
) -> Generator[pa.RecordBatch, None, None]:
    """The rows in order, cast to ``columns``, never all in memory; a batch is prepared while another is used."""
    # Not `to_pyarrow_batches`: Ibis 12 calls what DuckDB 2.0 no longer has, and the cursor would hold all rows.
    reader = connection.con.sql(connection.compile(rows)).to_arrow_reader(batch_rows)

    def following() -> pa.RecordBatch | None:
        batch = next(reader, None)
        return None if batch is None else batch.select(columns.names).cast(columns)

    with closing(reader), ThreadPoolExecutor(max_workers=1) as ahead:
        coming = ahead.submit(following)
        while (batch := coming.result()) is not None:
            coming = ahead.submit(following)
            yield batch


def fetched_ahead(connection: Backend, queries: Iterable[Table]) -> Iterator[pa.Table]:
    """The results of ``queries`` in order; one runs while the caller uses the one before."""
    # A cursor of its own: the caller goes on using the connection meanwhile.
    cursor = connection.con.cursor()
    cursor.execute("use staged")

    def result(statement: str) -> pa.Table:
        return cursor.sql(statement).to_arrow_table()

    with ThreadPoolExecutor(max_workers=1) as ahead:
        coming: Future[pa.Table] | None = None
        for query in queries:
            following = ahead.submit(result, connection.compile(query))
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _bytes(size: str) -> float:
    """Of DuckDB's way to write a size, such as ``3.7 GiB``."""
    number, unit = size.split()
    return float(number) * _UNITS[unit]


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _execute(connection: Backend, statement: str) -> None:
    connection.con.execute(statement).fetchall()
