"""Prepares on one machine with DuckDB, which spills to disk beyond a memory limit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import repeat, takewhile
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.duckdb_files import first_line, unreadable
from ssr_rec.data.preparation.engine import ROW, OpenSource, Progress, ahead
from ssr_rec.data.preparation.split import ORDER, SPLIT
from ssr_rec.data.schema import Schema
from ssr_rec.data.shards import arrow_schema, write_splits

STREAM_ROWS = 65_536
PART_ROWS = 1_000_000
"""Rows whose lists are encoded at once; their items are in memory together."""
STAGED_SHARE = 5
"""Text takes two to three times its size once staged, and joins and sorts need the rest of the memory."""
PACKED = 8
"""About what gzip and parquet save."""
STAGED_FILE = "staged.duckdb"
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@contextmanager
def connect(spill: Path, memory_limit: str, threads: int | None, files: Sequence[Path]) -> Iterator[DuckEngine]:
    """Yield an engine that keeps at most ``memory_limit`` (such as ``4GB``) and spills the rest to ``spill``.

    Args:
        files: what it will read; their size decides whether they are staged in memory or on disk.

    Raises:
        UserError: the limit is not a size, or the work does not fit it even with spilling.
    """
    connection = open_duckdb(spill, memory_limit, threads)
    try:
        # A database on disk is written compressed and only cached in memory, where one in memory would be spilled as
        # it is, or compressed all at once at its first update; where all fits, both only cost time.
        text = sum(path.stat().st_size * (PACKED if path.suffix in (".gz", ".parquet") else 1) for path in files)
        on_disk = text > limit_bytes(connection) / STAGED_SHARE
        spill.mkdir(exist_ok=True)
        place = str(spill / STAGED_FILE).replace("'", "''") if on_disk else ":memory:"
        _execute(connection, f"attach '{place}' as staged")
        _execute(connection, "use staged")
        _execute(connection, "create macro hex_number(digits) as ('0x' || digits)::bigint")
        yield DuckEngine(connection, on_disk)
    except duckdb.OutOfMemoryException as error:
        raise UserError(f"--memory-limit {memory_limit} is too small: {first_line(error)}") from None
    except duckdb.Error as error:  # reading names its file; what is left is of all files, or of the disk
        raise UserError(f"{files[0]}{' and others' if files[1:] else ''}: DuckDB: {first_line(error)}") from None
    finally:
        connection.disconnect()
        shutil.rmtree(spill, ignore_errors=True)


def open_duckdb(spill: Path, memory_limit: str, threads: int | None) -> Backend:
    """Return a connection to a database in memory.

    Raises:
        UserError: the limit is not a size.
    """
    settings = {
        "memory_limit": memory_limit,
        "temp_directory": str(spill),
        "autoinstall_known_extensions": False,
        # A parquet file's statistics leave NaN out, and DuckDB 2.0 concludes from them that isnan() holds nowhere.
        "disabled_optimizers": "statistics_propagation",
    }
    if threads is not None:
        settings["threads"] = threads
    try:
        return ibis.duckdb.connect(**settings)
    except duckdb.Error as error:
        raise UserError(f"--memory-limit {memory_limit}, --threads {threads}: {first_line(error)}") from None


class DuckEngine:
    """See ``Engine``."""

    def __init__(self, connection: Backend, on_disk: bool) -> None:
        self.connection, self.on_disk = connection, on_disk

    def stage(
        self, name: str, files: Sequence[Path], open_source: OpenSource, progress: Progress
    ) -> tuple[Table, list[tuple[Path, int]]]:
        upto: list[tuple[Path, int]] = []
        for path in files:
            source = open_source(self.connection, path)
            try:
                if upto:
                    self.connection.insert(name, source.rows.cast(self.connection.table(name).schema()))
                else:
                    self.create_table(name, source.rows)
            except duckdb.OutOfMemoryException:
                raise
            except duckdb.Error as error:
                raise unreadable(source, error) from None
            upto.append((path, int(self.connection.table(name).count().to_pyarrow().as_py())))
            progress(f"read {path.name}", upto[-1][1])
        return self.connection.table(name), upto

    def numbered(self, table: Table, columns: Sequence[str]) -> Table:
        if ROW in table.columns:
            return table.select(ROW, *columns)
        return table.select(*columns, **{ROW: table.rowid()})

    def with_column(self, table: Table, name: str, needed: Sequence[str], compute: Callable[[Table], Table]) -> Table:
        if self.on_disk:
            # Computed again with every use: that takes half a second for ten million rows, an update 20.
            return self.create_view(f"with_{name}", compute(self.numbered(table, _but_row(table))))
        rows = compute(self.numbered(table, needed))
        # The name may be qualified; what is staged is in the current schema.
        staged, key = table.get_name().split(".")[-1], ROW if ROW in table.columns else "rowid"
        values = self.connection.compile(rows.select(ROW, name))
        _execute(self.connection, f'alter table "{staged}" add column "{name}" bigint')
        _execute(
            self.connection,
            f'update "{staged}" set "{name}" = found."{name}" from ({values}) found '
            f'where "{staged}".{key} = found."{ROW}"',
        )
        return self.connection.table(staged)

    def store(self, name: str, rows: pa.Table) -> Table:
        # Not `create_table`: Ibis 12 ends it with a statement that DuckDB 2.0 does not parse.
        self.connection.con.register("__stored__", rows)
        _execute(self.connection, f"create table {name} as select * from __stored__")
        self.connection.con.unregister("__stored__")
        return self.connection.table(name)

    def create_table(self, name: str, rows: Table) -> Table:
        return self.connection.create_table(name, rows)

    def in_parts(self, name: str, rows: Table, compute: Callable[[Table], Table], progress: Progress) -> Table:
        total = int(rows.count().to_pyarrow().as_py())
        for first in range(0, total, PART_ROWS):
            part = compute(rows.filter((rows[ROW] >= first) & (rows[ROW] < first + PART_ROWS)))
            if first:
                self.connection.insert(name, part)
            else:
                self.create_table(name, part)
            progress(name, min(total, first + PART_ROWS))
        return self.connection.table(name)

    def create_view(self, name: str, rows: Table) -> Table:
        return self.connection.create_view(name, rows)

    def results(self, queries: Iterable[Table]) -> Iterator[pa.Table]:
        # A cursor of its own: the caller goes on using the connection meanwhile.
        cursor = self.connection.con.cursor()
        cursor.execute("use staged")

        def result(statement: str) -> pa.Table:
            return cursor.sql(statement).to_arrow_table()

        return ahead(partial(result, self.connection.compile(query)) for query in queries)

    def write(
        self,
        schema: Schema,
        encoded: Table,
        keys: Table,
        counts: dict[str, dict[str, int]],
        folder: Path,
        progress: Progress,
    ) -> Schema:
        # A random split cuts the shuffled order itself, and one sort key is cheaper than two.
        random = schema.preparation["split"]["type"] == "random"
        ordered = encoded.order_by(*([] if random else [SPLIT]), ORDER)
        with closing(_stream(self.connection, ordered, arrow_schema(schema))) as batches:
            return write_splits(schema, counts, batches, folder, progress)


def _stream(connection: Backend, rows: Table, columns: pa.Schema) -> Generator[pa.RecordBatch, None, None]:
    """Yield the rows in order, cast to ``columns``, never all in memory; a batch is prepared while another is used."""
    # Not `to_pyarrow_batches`: Ibis 12 calls what DuckDB 2.0 no longer has, and the cursor would hold all rows.
    reader = connection.con.sql(connection.compile(rows)).to_arrow_reader(STREAM_ROWS)

    def following() -> pa.RecordBatch | None:
        batch = next(reader, None)
        return None if batch is None else batch.select(columns.names).cast(columns)

    with closing(reader), closing(ahead(repeat(following))) as batches:
        yield from takewhile(lambda batch: batch is not None, batches)


def _but_row(table: Table) -> list[str]:
    return [name for name in table.columns if name != ROW]


def limit_bytes(connection: Backend) -> float:
    """Return the memory limit of a connection."""
    # Written as ``3.7 GiB``.
    number, unit = connection.con.execute("select current_setting('memory_limit')").fetchall()[0][0].split()
    return float(number) * _UNITS[unit]


def _execute(connection: Backend, statement: str) -> None:
    connection.con.execute(statement).fetchall()
