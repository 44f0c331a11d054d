"""Find the files of a log and stage their columns, typed by the spec, as one numbered table."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ibis.backends.duckdb import Backend
from ibis.expr import datatypes as dt
from ibis.expr.types import Table

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local, place
from ssr_rec.data.preparation import duckdb_files as duck_files
from ssr_rec.data.preparation.column_types import as_type, common_types, selected
from ssr_rec.data.preparation.engine import Engine, OpenSource, Progress, Source
from ssr_rec.data.preparation.spec import TableSpec, TextFormat

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
MAX_HEADER_BYTES = 2**22


@dataclass(frozen=True)
class Log:
    """Holds all input rows, staged, one column per used column of the spec."""

    engine: Engine
    table: Table
    files: list[tuple[Path, int]]
    """Each file, in order, and the rows up to and including it."""

    def rows(self, columns: Sequence[str]) -> Table:
        """Return some of the columns, and ``ROW``."""
        return self.engine.numbered(self.table, columns)

    @property
    def count(self) -> int:
        return self.files[-1][1]

    def where(self, row: int) -> str:
        """Return ``file: row n``, n from 1 in that file, its header not counted."""
        before = 0
        for path, upto in self.files:
            if row < upto:
                return f"{path}: row {row - before + 1}"
            before = upto
        raise IndexError(row)


Read = Callable[[Engine, list[Path], TableSpec, Progress], Log]


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Return files named directly, by glob, or by folder (every text and parquet file in it), in the order given.

    Within a glob or folder the order is by name. It matters: the split is drawn from the row number.

    Raises:
        UserError: a name matches nothing, or a file is matched twice.
    """
    files: list[Path] = []
    for name in inputs:
        path = place(name)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.is_file() and suffix_of(p) in SUFFIXES and p.name[0] != ".")
        elif path.is_file():
            found = [path]
        else:
            matches = map(Path, glob.glob(name)) if is_local(path) else _glob(path)
            found = sorted(match for match in matches if match.is_file())
        if not found:
            raise UserError(f"{name}: no such file, or a folder or pattern without {', '.join(SUFFIXES)} files")
        files += found
    for path in files:
        if files.count(path) > 1:
            raise UserError(f"{path}: given twice as input")
    return files


def _glob(pattern: Path) -> Iterator[Path]:
    """Return the files that match the URL ``pattern``."""
    root = pattern
    while any(letter in root.name for letter in "*?["):
        root = root.parent
    return root.glob(pattern.path.removeprefix(root.path).lstrip("/"))  # type: ignore[attr-defined]


def read_table(engine: Engine, files: list[Path], spec: TableSpec, progress: Progress) -> Log:
    """Stage CSV, TSV and parquet files; a column has one type, the same in whatever order the files come."""
    types = common_types(files, partial(open_table, spec=spec), spec)
    return stage_all(engine, files, partial(open_table, spec=spec, types=types), progress)


def open_table(
    connection: Backend, path: Path, spec: TableSpec, types: Mapping[str, dt.DataType] | None = None
) -> Source:
    """Return the columns of one file that ``spec`` uses, typed; as ``types`` says, where it does."""
    source = selected(open_source(connection, path, spec.text, spec.numbers), spec)
    if not types:
        return source
    rows = source.rows.select(**{name: as_type(source.rows[name], types.get(name)) for name in source.rows.columns})
    return replace(source, rows=rows)


def open_source(connection: Backend, path: Path, form: TextFormat, numbers: Collection[str]) -> Source:
    """Open one file, lazily; the columns of a text file are text, but for ``numbers``.

    Raises:
        UserError: unknown kind of file, unreadable header, or not a parquet file.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return Source(path, duck_files.parquet_table(connection, path))
    if suffix not in TEXT_SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; give {', '.join(SUFFIXES)}, text also with .gz")
    delimiter = form.delimiter or ("," if suffix == ".csv" else "\t")
    columns = form.columns or _header(path, delimiter, form)
    types = {column: "float64" if column in numbers else "string" for column in columns}
    rows = duck_files.text_table(connection, path, types, form, delimiter)
    return Source(path, rows, partial(_explain_text, connection, path, types, form, delimiter))


def stage_all(
    engine: Engine, files: Sequence[Path], open_source: OpenSource, progress: Progress, table: str = "log"
) -> Log:
    """Stage the rows of every file, in order, as one table.

    Raises:
        UserError: a broken file, no rows at all, or what ``open_source`` finds wrong with a file.
    """
    staged, upto = engine.stage(table, files, open_source, progress)
    if not upto[-1][1]:
        raise UserError(f"{', '.join(str(path) for path in files)}: no rows at all")
    return Log(engine, staged, upto)


def _explain_text(
    connection: Backend, path: Path, types: dict[str, str], form: TextFormat, delimiter: str
) -> str | None:
    found = duck_files.first_rejected(connection, path, types, form, delimiter)
    if found is None:
        return _explain_line_ends(path)
    row, column, error, line = found
    shown = f"row {row} ({line[:80]!r})"
    if error == "CAST":
        return f"{shown}: column {column!r} must be a number; correct the row, or name the column under categorical"
    if error in ("MISSING COLUMNS", "TOO MANY COLUMNS"):
        return f"{shown}: not the {len(types)} columns of a row; correct it, or set text.delimiter and text.quote"
    return f"{shown}: {error.lower()}"


def _explain_line_ends(path: Path) -> str | None:
    """Return what to say of a file whose lines end in several ways, as files joined on Windows and Linux do."""
    with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as whole:
        first, number = None, 0
        for number, line in enumerate(whole, start=1):
            ending = line[len(line.rstrip(b"\r\n")) :]
            first = first or ending
            if (ending and ending != first) or first == b"\r\r\n":
                return f"line {number} ends in {ending!r} and those before in {first!r}; give all lines one end"
    return None


def _header(path: Path, delimiter: str, form: TextFormat) -> list[str]:
    try:
        with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as whole:
            # Bounded, as a small gzip file may hold one line without end.
            start = whole.read(MAX_HEADER_BYTES)
        is_cut = len(start) == MAX_HEADER_BYTES
        if is_cut and b"\n" not in start and b"\r" not in start:
            raise UserError(f"{path}: its first line is longer than {MAX_HEADER_BYTES:,} bytes; it is no header")
        lines = io.StringIO(start.decode("utf-8-sig", errors="ignore" if is_cut else "strict"), newline="")
        if len(delimiter) == 1:
            names = next(csv.reader(lines, delimiter=delimiter, quotechar='"' if form.quote else None), [])
        else:
            names = lines.readline().rstrip("\r\n").split(delimiter)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read, is it complete? {error}") from None
    # As pandas calls them: an index that it has written, or what follows a last delimiter.
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: the header names column {name!r} twice")
    if not names:
        raise UserError(f"{path}: no rows at all, not even a header")
    return names


def suffix_of(path: Path) -> str:
    return path.suffixes[-2].lower() if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix.lower()
