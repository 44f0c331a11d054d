"""Score a file of raw rows to a file of probabilities, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ssr_rec.data.sources import TEXT_SUFFIXES
from ssr_rec.data.table_spec import TextFormat
from ssr_rec.raw_rows import check_columns
from ssr_rec.schema import LogBuckets, Schema
from ssr_rec.serving import Scorer

ROWS_AT_ONCE = 2**16
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
        ValueError: a file that cannot be read, or what ``Scorer.predict`` refuses; the message names file and row.
    """
    if target.suffix != ".parquet":
        raise ValueError(f"{target}: the output is parquet; give it a name ending in .parquet")
    wanted = list(dict.fromkeys([*scorer.encoder.columns, *keep]))
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    done, writer = 0, None
    try:
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
            raise ValueError(f"{source}: {' '.join(str(error).split())[:500]}") from None
        finally:
            if writer is not None:
                writer.close()
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
    return done


def _pieces(source: Path, schema: Schema, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of ``names``, at least one piece, an empty one of an empty file."""
    if not source.is_file():
        raise ValueError("no such file")
    suffix = source.suffixes[-2] if source.suffix == ".gz" and len(source.suffixes) > 1 else source.suffix
    if suffix == ".parquet":
        file = pq.ParquetFile(source)
        check_columns(file.schema_arrow.names, names)
        kinds, pieces = file.schema_arrow, file.iter_batches(ROWS_AT_ONCE, columns=list(names))
    elif suffix in TEXT_SUFFIXES:
        pieces = _text(source, suffix, schema, names)
        kinds = pieces.schema
    else:
        raise ValueError(f"unknown kind of file; give .parquet, {', '.join(TEXT_SUFFIXES)}, text also with .gz")
    empty = True
    for piece in pieces:
        empty = False
        yield piece.select(list(names))
    if empty:
        yield pa.RecordBatch.from_pylist([], pa.schema([kinds.field(name) for name in names]))


def _text(source: Path, suffix: str, schema: Schema, names: Sequence[str]) -> pyarrow.csv.CSVStreamingReader:
    form = TextFormat.model_validate(schema.preparation.get("text", {}))
    numbers = {f.encoding.column for f in schema.features if isinstance(f.encoding, LogBuckets)}
    reader = pyarrow.csv.open_csv(
        pa.input_stream(str(source)),
        read_options=pyarrow.csv.ReadOptions(column_names=form.columns, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=form.delimiter or ("," if suffix == ".csv" else "\t"),
            quote_char='"' if form.quote else False,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            # As in the preparation: all is text but numbers, and only an empty field is missing.
            column_types={name: pa.float64() if name in numbers else pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    check_columns(reader.schema.names, names)
    return reader
