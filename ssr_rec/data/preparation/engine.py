"""Defines what the preparation asks of an engine. All else is Ibis expressions, the same for every engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa
from ibis.backends.duckdb import Backend as DuckDB
from ibis.expr.types import Table

from ssr_rec.data.schema import Schema

ROW = "__row__"
"""Position of a row over all input files in the order given, from 0."""


@dataclass(frozen=True)
class Source:
    """Gives one input file's rows, lazily, and what to say of the row that broke reading it (None: nothing known)."""

    path: Path
    rows: Table
    explain: Callable[[], str | None] = lambda: None


OpenSource = Callable[[DuckDB, Path], Source]
"""Every engine parses files with DuckDB, wherever it does so, lest a quote or a number be read in two ways."""

T = TypeVar("T")

Progress = Callable[[str, int], None]
"""Called with what was just finished and the rows it covered so far."""


class Engine(Protocol):
    """Keeps tables and runs expressions. Its methods raise ValueError for what the user can mend."""

    def stage(
        self, name: str, files: Sequence[Path], open_source: OpenSource, progress: Progress
    ) -> tuple[Table, list[tuple[Path, int]]]:
        """Return the rows of all files, in order, as a table; and each file with the rows up to and including it.

        The first file decides the types: a column that is whole in one file and float in the next is still one column.

        Raises:
            UserError: a broken file, or a value that does not fit its column; the message names file, row and column.
        """

    def numbered(self, table: Table, columns: Sequence[str]) -> Table:
        """Return some columns of a staged table, and ``ROW``."""

    def with_column(self, table: Table, name: str, needed: Sequence[str], compute: Callable[[Table], Table]) -> Table:
        """Return the staged ``table`` with a further int64 column.

        Args:
            compute: adds ``name`` to rows that have ``ROW``, the ``needed`` columns, and perhaps more.
        """

    def store(self, name: str, rows: pa.Table) -> Table:
        """Make a table of the engine from one in memory."""

    def create_table(self, name: str, rows: Table) -> Table:
        """Return a table that is computed once."""

    def in_parts(self, name: str, rows: Table, compute: Callable[[Table], Table], progress: Progress) -> Table:
        """Return what ``compute`` makes of ``rows``, whose lists it regroups; perhaps some at a time, into a table.

        Args:
            rows: they have ``ROW``.
        """

    def create_view(self, name: str, rows: Table) -> Table:
        """Return a name for an expression, so that it is compiled once."""

    def results(self, queries: Iterable[Table]) -> Iterator[pa.Table]:
        """Return the results of queries in order; one may run while the caller uses the one before."""

    def write(
        self,
        schema: Schema,
        encoded: Table,
        keys: Table,
        counts: dict[str, dict[str, int]],
        folder: Path,
        progress: Progress,
    ) -> Schema:
        """Write the encoded rows as shards, split by split in their shuffled order, and return the schema with them.

        Args:
            encoded: the columns of ``arrow_schema``, SPLIT and ORDER.
            keys: SPLIT and ORDER alone, cheaper to ask for.
            counts: ``rows`` of every split.
        """


def ahead(calls: Iterable[Callable[[], T]], most: int = 1) -> Generator[T, None, None]:
    """Yield the results of ``calls`` in order; up to ``most`` run while the caller uses the one before."""
    with ThreadPoolExecutor(max_workers=most) as pool:
        coming: deque[Future[T]] = deque()
        for call in calls:
            coming.append(pool.submit(call))
            if len(coming) > most:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
