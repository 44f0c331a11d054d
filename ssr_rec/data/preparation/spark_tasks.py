"""Parses input files and writes shards in Python on the executors of Spark, with the code of one machine.

Nothing of Spark is imported here: record batches come and go.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import duckdb
import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.duckdb_engine import open_duckdb
from ssr_rec.data.preparation.duckdb_files import first_line, unreadable
from ssr_rec.data.preparation.engine import OpenSource
from ssr_rec.data.shards import write_shard

FILE = "__file__"
"""Which input file a row is from, from 0."""
POSITION = "__position__"
"""Which row of its file it is, from 0."""
SHARD = "__shard__"
"""Which shard a row falls to, from 0 over all splits."""
BATCH_ROWS = 8_192

_MARK = "ssr_rec refuses: "


@dataclass(frozen=True)
class ReadFiles:
    """Turns numbers of files into the rows of these files, with ``FILE`` and ``POSITION``.

    Attributes:
        types: of the columns.
        memory_limit: of the DuckDB that parses.
    """

    files: Sequence[Path]
    open_source: OpenSource
    types: ibis.Schema
    memory_limit: str

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number in chain.from_iterable(batch.column(0).to_pylist() for batch in batches):
            try:
                yield from self._rows(number)
            except ValueError as error:
                raise UserError(_MARK + json.dumps(str(error))) from None

    def _rows(self, number: int) -> Iterator[pa.RecordBatch]:
        spill = Path(tempfile.mkdtemp(prefix="ssr_rec."))
        # One thread: the rows come in order, and Spark runs as many tasks as there are cores.
        connection = open_duckdb(spill, self.memory_limit, 1)
        try:
            source = self.open_source(connection, self.files[number])
            columns = self.types.to_pyarrow()
            position = 0
            try:
                query = connection.con.sql(connection.compile(source.rows.cast(self.types)))
                for batch in query.to_arrow_reader(BATCH_ROWS):
                    here = np.arange(position, position + batch.num_rows)
                    position += batch.num_rows
                    yield pa.RecordBatch.from_arrays(
                        [*batch.cast(columns).columns, pa.repeat(pa.scalar(number, pa.int32()), len(here)), here],
                        [*columns.names, FILE, POSITION],
                    )
            except duckdb.OutOfMemoryException as error:
                raise UserError(f"--memory-limit {self.memory_limit} is too small: {first_line(error)}") from None
            except duckdb.Error as error:
                raise unreadable(source, error) from None
        finally:
            connection.disconnect()
            shutil.rmtree(spill, ignore_errors=True)


@dataclass(frozen=True)
class ShardTask:
    split: str
    path: str
    num_rows: int
    rows_in_group: int


@dataclass(frozen=True)
class WriteShard:
    """Writes the rows of one shard, in order and with ``SHARD``, to a file and yields one row about it: ``RESULT``."""

    shards: Sequence[ShardTask]
    columns: pa.Schema
    folder: Path

    RESULT = "number int, shard string"
    """Which shard, and the ``Shard`` as JSON."""

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = (batch for batch in batches if batch.num_rows)
        first = next(rows, None)
        if first is None:
            return
        number = first.column(SHARD)[0].as_py()
        planned = self.shards[number]
        written = write_shard(chain([first], rows), self.columns, self.folder, planned.path, planned.rows_in_group)
        assert written.num_rows == planned.num_rows, f"{planned.path}: {written.num_rows} rows, not {planned.num_rows}"
        yield pa.RecordBatch.from_pydict(
            {"number": pa.array([number], pa.int32()), "shard": [written.model_dump_json()]}
        )


def c_ln(numbers: pa.Array) -> pa.Array:
    return pc.ln(numbers)


def c_transformed(lists: pa.Array) -> pa.Array:
    """Return ``encode.transformed`` of every item of lists of float64, none of which is null."""
    items = lists.values
    logs = pc.multiply(pc.ln(pc.add(pc.abs(items), 1.0)), pc.sign(items))
    return type(lists).from_arrays(lists.offsets, logs)


def refusal(error: Exception) -> str | None:
    """Return what a task refused, found in the error that Spark makes of it."""
    found = re.search(rf'{_MARK}("(?:[^"\\]|\\.)*")', str(error))
    return json.loads(found.group(1)) if found else None
