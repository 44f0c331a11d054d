"""Score a file of raw rows to a file of probabilities, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import new_file
from ssr_rec.data.features import LogBuckets
from ssr_rec.data.preparation.duckdb_engine import open_duckdb
from ssr_rec.data.preparation.duckdb_files import unreadable
from ssr_rec.data.preparation.sources import TEXT_SUFFIXES, open_source, suffix_of
from ssr_rec.data.preparation.spec import TextFormat
from ssr_rec.data.schema import Schema
from ssr_rec.serving.raw_columns import check_columns
from ssr_rec.serving.scorer import Scorer

ROWS_AT_ONCE = 2**16
MEMORY_LIMIT = "2GB"
"""Of the parser of text files."""
PREFIX = "p_"
"""Of the probability columns, so that a label's own column may stand beside them."""


def score_file(
    scorer: Scorer,
    source: Path,
    target: Path,
    keep: Sequence[str] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write ``target``, a parquet file of the ``keep`` columns and ``p_<label>`` float32, in the rows' order.

    The file appears whole or not at all.

    Args:
        source: parquet, or CSV or TSV (plain or .gz) in the text form of the preparation, where empty is missing.
        keep: columns to carry over.
        progress: told after each piece how many rows are done.

    Returns:
        the number of rows.

    Raises:
        UserError: a file that cannot be read, or what ``Scorer.predict`` refuses; the message names file and row.
    """
    if target.suffix != ".parquet":
        raise UserError(f"{target}: the output is parquet; give it a name ending in .parquet")
    wanted = list(dict.fromkeys([*scorer.encoder.columns, *keep]))
    target.parent.mkdir(parents=True, exist_ok=True)
    done, writer = 0, None
    with new_file(target) as work:
        try:
            for piece in _pieces(source, scorer.schema, wanted):
                probabilities = scorer.predict(piece, done)
                columns = {name: piece.column(name) for name in keep}
                columns |= {PREFIX + label: pa.array(values) for label, values in probabilities.items()}
                table = pa.table(columns)
                writer = writer or pq.ParquetWriter(work, table.schema)
                writer.write_table(table)
                done += len(piece)
                progress(done)
        except (ValueError, OSError) as error:  # Arrow's errors are of these kinds
            problem = " ".join(str(error).removeprefix(f"{source}: ").split())[:500]
            raise UserError(f"{source}: {problem}") from None
        finally:
            if writer is not None:
                writer.close()
    return done


def _pieces(source: Path, schema: Schema, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the columns of ``names``, at least one piece, an empty one of an empty file."""
    if not source.is_file():
        raise UserError("no such file")
    suffix = suffix_of(source)
    if suffix == ".parquet":
        file = pq.ParquetFile(source)
        check_columns(file.schema_arrow.names, names)
        yield from _or_an_empty_one(file.iter_batches(ROWS_AT_ONCE, columns=list(names)), file.schema_arrow, names)
    elif suffix in TEXT_SUFFIXES:
        with _text(source, schema, names) as reader:
            yield from _or_an_empty_one(reader, reader.schema, names)
    else:
        raise UserError(f"unknown kind of file; give .parquet, {', '.join(TEXT_SUFFIXES)}, text also with .gz")


def _or_an_empty_one(
    pieces: Iterable[pa.RecordBatch], kinds: pa.Schema, names: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    empty = True
    for piece in pieces:
        empty = False
        yield piece.select(list(names))
    if empty:
        yield pa.RecordBatch.from_pylist([], pa.schema([kinds.field(name) for name in names]))


@contextmanager
def _text(source: Path, schema: Schema, names: Sequence[str]) -> Iterator[pa.RecordBatchReader]:
    """Yield the rows of a text file as the preparation reads them, with its own reader."""
    form = TextFormat.model_validate(schema.preparation.get("text", {}))
    numbers = {f.encoding.column for f in schema.features if f.kind != "list" and isinstance(f.encoding, LogBuckets)}
    numbers |= {column.name for column in schema.dense}
    with TemporaryDirectory(prefix="ssr_rec.") as spill:
        connection = open_duckdb(Path(spill), MEMORY_LIMIT, None)
        try:
            opened = open_source(connection, source, form, numbers)
            check_columns(list(opened.rows.columns), names)
            query = connection.compile(opened.rows.select(list(names)))
            try:
                yield connection.con.sql(query).to_arrow_reader(ROWS_AT_ONCE)
            except duckdb.Error as error:
                raise unreadable(opened, error) from None
        finally:
            connection.disconnect()
