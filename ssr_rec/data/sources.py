"""Find the files of a log and stage their columns, typed by the spec, as one numbered table."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ibis
from ibis.backends.duckdb import Backend
from ibis.expr import datatypes as dt
from ibis.expr.types import ArrayColumn, Column, Table

from ssr_rec.data import duck_files
from ssr_rec.data.engine import Engine, OpenSource, Progress, Source
from ssr_rec.data.table_spec import ListColumn, TableSpec, TextFormat
from ssr_rec.places import is_local, place

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")


@dataclass(frozen=True)
class Log:
    """All input rows, staged, one column per used column of the spec."""

    engine: Engine
    table: Table
    files: list[tuple[Path, int]]
    """Each file, in order, and the rows up to and including it."""

    def rows(self, columns: Sequence[str]) -> Table:
        """Some of the columns, and ``ROW``."""
        return self.engine.numbered(self.table, columns)

    @property
    def count(self) -> int:
        return self.files[-1][1]

    def where(self, row: int) -> str:
        """``file: row n``, n from 1 in that file, its header not counted."""
        before = 0
        for path, upto in self.files:
            if row < upto:
                return f"{path}: row {row - before + 1}"
            before = upto
        raise IndexError(row)


Read = Callable[[Engine, list[Path], TableSpec, Progress], Log]


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files named directly, by glob, or by folder (every text and parquet file in it), in the order given.

    Within a glob or folder the order is by name. It matters: the split is drawn from the row number.

    Raises:
        ValueError: a name matches nothing, or a file is matched twice.
    """
    files: list[Path] = []
    for name in inputs:
        path = place(name)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in SUFFIXES and p.name[0] != ".")
        elif path.is_file():
            found = [path]
        else:
            matches = map(Path, glob.glob(name)) if is_local(path) else _glob(path)
            found = sorted(match for match in matches if match.is_file())
        if not found:
            raise ValueError(f"{name}: no such file, or a folder or pattern without {', '.join(SUFFIXES)} files")
        files += found
    for path in files:
        if files.count(path) > 1:
            raise ValueError(f"{path}: given twice as input")
    return files


def _glob(pattern: Path) -> Iterator[Path]:
    """The files that match the URL ``pattern``."""
    root = pattern
    while any(letter in root.name for letter in "*?["):
        root = root.parent
    return root.glob(pattern.path.removeprefix(root.path).lstrip("/"))  # type: ignore[attr-defined]


def read_table(engine: Engine, files: list[Path], spec: TableSpec, progress: Progress) -> Log:
    """Stage CSV, TSV and parquet files as they are."""
    return stage_all(engine, files, partial(open_table, spec=spec), progress)


def open_table(connection: Backend, path: Path, spec: TableSpec) -> Source:
    """The columns of one file that ``spec`` uses, typed."""
    return selected(open_source(connection, path, spec.text, [*spec.labels, *spec.numeric]), spec)


def open_source(connection: Backend, path: Path, form: TextFormat, numbers: Collection[str]) -> Source:
    """Open one file, lazily; the columns of a text file are text, but for ``numbers``.

    Raises:
        ValueError: unknown kind of file, unreadable header, or not a parquet file.
    """
    suffix = _suffix(path)
    if suffix == ".parquet":
        return Source(path, duck_files.read_parquet(connection, path))
    if suffix not in TEXT_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; give {', '.join(SUFFIXES)}, text also with .gz")
    delimiter = form.delimiter or ("," if suffix == ".csv" else "\t")
    columns = form.columns or _header(path, delimiter, form)
    types = {column: "float64" if column in numbers else "string" for column in columns}
    rows = duck_files.read_text(connection, path, types, form, delimiter)
    return Source(path, rows, partial(_explain_text, connection, path, types, form, delimiter))


def stage_all(
    engine: Engine, files: Sequence[Path], open_source: OpenSource, progress: Progress, table: str = "log"
) -> Log:
    """Stage the rows of every file, in order, as one table.

    Raises:
        ValueError: a broken file, no rows at all, or what ``open_source`` finds wrong with a file.
    """
    staged, upto = engine.stage(table, files, open_source, progress)
    if not upto[-1][1]:
        raise ValueError(f"{', '.join(str(path) for path in files)}: no rows at all")
    return Log(engine, staged, upto)


def selected(source: Source, spec: TableSpec) -> Source:
    """The columns that ``spec`` uses, typed.

    Raises:
        ValueError: a column without a role, a role without a column, or a type that does not fit the role.
    """
    spec.check_columns(source.rows.columns, source.path)
    try:
        rows = source.rows.select(**{name: typed(source.rows[name], name, spec) for name in spec.used})
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    return replace(source, rows=rows)


def typed(column: Column, name: str, spec: TableSpec) -> Column:
    """The column as its role wants it: float64 labels and numbers (NaN is null), text or whole-number ids, cut lists.

    Raises:
        ValueError: the type in the file does not fit the role.
    """
    kind = column.type()
    if name in spec.lists:
        return _typed_list(column, name, spec.lists[name])
    if isinstance(kind, dt.Array):
        raise ValueError(f"column {name!r} holds lists; name it under lists with a max_length, or ignore it")
    if name in spec.labels or name in spec.numeric:
        if not (kind.is_numeric() or kind.is_boolean()):
            raise ValueError(f"column {name!r} holds {kind}, not numbers; name it under categorical, or convert it")
        number = column.cast("float64")
        return number if name in spec.labels else number.isnan().ifelse(ibis.null("float64"), number)
    if name in spec.categorical and not _is_id(kind):
        raise ValueError(f"categorical column {name!r} holds {kind}; name it under numeric, or convert it to text")
    return column


def _typed_list(column: Column, name: str, settings: ListColumn) -> Column:
    kind = column.type()
    if kind.is_string():
        if settings.separator is None:
            raise ValueError(f"list column {name!r} holds text; give its separator, or name it under categorical")
        column = column.split(settings.separator)
    elif not isinstance(kind, dt.Array):
        raise ValueError(f"list column {name!r} holds {kind}, not lists; name it under categorical or numeric")
    elif not _is_id(kind.value_type):
        raise ValueError(f"list column {name!r} holds lists of {kind.value_type}; items must be text or whole numbers")
    return cut_list(column, settings)


def cut_list(column: ArrayColumn, settings: ListColumn) -> ArrayColumn:
    """The first, or last, ``max_length`` items."""
    if settings.keep == "first":
        return column[: settings.max_length]
    return column[ibis.greatest(column.length() - settings.max_length, 0) :]


def _is_id(kind: dt.DataType) -> bool:
    # A float has no one text form, and a vocabulary must read the same everywhere.
    return bool(kind.is_string() or kind.is_integer() or kind.is_boolean() or kind.is_date())


def _explain_text(
    connection: Backend, path: Path, types: dict[str, str], form: TextFormat, delimiter: str
) -> str | None:
    found = duck_files.first_rejected(connection, path, types, form, delimiter)
    if found is None:
        return None
    row, column, error, line = found
    shown = f"row {row} ({line[:80]!r})"
    if error == "CAST":
        return f"{shown}: column {column!r} must be a number; correct the row, or name the column under categorical"
    if error in ("MISSING COLUMNS", "TOO MANY COLUMNS"):
        return f"{shown}: not the {len(types)} columns of a row; correct it, or set text.delimiter and text.quote"
    return f"{shown}: {error.lower()}"


def _header(path: Path, delimiter: str, form: TextFormat) -> list[str]:
    try:
        with path.open("rb") as file, gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as whole:
            lines = io.TextIOWrapper(whole, encoding="utf-8-sig", newline="")
            names = next(csv.reader(lines, delimiter=delimiter, quotechar='"' if form.quote else None), [])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read, is it complete? {error}") from None
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: the header names column {name!r} twice")
    if not names:
        raise ValueError(f"{path}: no rows at all, not even a header")
    return names


def _suffix(path: Path) -> str:
    return path.suffixes[-2].lower() if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix.lower()
