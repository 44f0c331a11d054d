"""Write a split as parquet shards, and a dataset folder that appears whole or not at all.

A flipped bit in a shard would be another id or label, and decoders of damaged bytes may do anything. So each page
carries a checksum, and the digest of the footer, which says where the pages are and what is in them, stands in the
schema. What neither covers is the few bytes before each page; ``data/row_groups.py`` checks what they could change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import is_local, sink
from ssr_rec.data.features import Feature
from ssr_rec.data.item_weights import stored_weights
from ssr_rec.data.schema import (
    DATASET_ID_KEY,
    GROUP_COLUMN,
    SCHEMA_FILE,
    SHARD_KEY,
    TOGETHER_COLUMN,
    WEIGHT_COLUMN,
    Schema,
)
from ssr_rec.data.splits import Lookups, Shard, Split

ROWS_PER_SHARD = 4_194_304
DAYS_FOLDER = "days"
YOUNG_S = 60.0


def row_group_rows(num_rows: int) -> int:
    """Return rows of a row group for a split of ``num_rows``: about 128 groups, between 4,096 and 65,536 rows each.

    The reader deals row groups to lanes, so a small split needs small groups to be dealt evenly; below 4,096 rows
    opening a group costs more than decoding it, past 65,536 larger ones only cost memory.
    """
    return min(65_536, max(4_096, num_rows // 128 // 1_024 * 1_024))


def arrow_schema(schema: Schema) -> pa.Schema:
    """Return the columns of every shard: features, item weights, dense columns, labels, group ids, weight."""
    fields = [
        pa.field(f.name, pa.list_(pa.int64()) if f.kind == "list" else pa.int64(), False, _special_ids(f))
        for f in schema.features
    ]
    fields += [pa.field(stored_weights(f.name), pa.list_(pa.float32()), nullable=False) for f in schema.weighted_lists]
    fields += [pa.field(column.name, pa.float64()) for column in schema.dense]
    fields += [pa.field(vector.name, pa.list_(pa.float64()), nullable=False) for vector in schema.row_vectors]
    for label in schema.labels:
        is_number, may_miss = schema.number(label) is not None, label in schema.missing_labels
        fields.append(pa.field(label, pa.float32() if is_number else pa.int8(), nullable=is_number and may_miss))
    if schema.group_id is not None:
        fields.append(pa.field(GROUP_COLUMN, pa.int64(), nullable=False))
    if schema.together_column == TOGETHER_COLUMN:
        fields.append(pa.field(TOGETHER_COLUMN, pa.int64(), nullable=False))
    if schema.weight is not None:
        fields.append(pa.field(WEIGHT_COLUMN, pa.float32(), nullable=False))
    return pa.schema(fields, metadata={DATASET_ID_KEY: schema.dataset_id.encode()})


def _special_ids(feature: Feature) -> dict[str, str] | None:
    """Return the ids of missing and of unknown values, where the encoding has them, for ``_count``."""
    found = {key: getattr(feature.encoding, f"{key}_id", None) for key in ("missing", "oov")}
    return {key: str(value) for key, value in found.items() if value is not None} or None


def write_shards(
    batches: Iterable[pa.RecordBatch], columns: pa.Schema, folder: Path, split: str, rows_in_group: int
) -> list[Shard]:
    """Write already shuffled record batches as ``folder/split/NNNNN.parquet`` and return the shards.

    Batches are cut and joined to row groups of exactly ``rows_in_group`` rows (the last one shorter), so memory
    holds about one row group whatever the size of the split. A split without rows has no shards.
    """
    tables = _exact_tables(batches, columns, rows_in_group)
    shards: list[Shard] = []
    for first in tables:
        groups = rows_in_shard(rows_in_group) // rows_in_group
        own = chain([first], islice(tables, groups - 1))
        shards.append(_write_shard(own, columns, folder, f"{split}/{len(shards):05d}.parquet", rows_in_group))
    return shards


def rows_in_shard(rows_in_group: int) -> int:
    """Return rows of every shard of a split but its last."""
    return -(-ROWS_PER_SHARD // rows_in_group) * rows_in_group


def write_shard(
    batches: Iterable[pa.RecordBatch], columns: pa.Schema, folder: Path, path: str, rows_in_group: int
) -> Shard:
    """Write the rows of one shard, as ``write_shards`` does for those of a split."""
    return _write_shard(_exact_tables(batches, columns, rows_in_group), columns, folder, path, rows_in_group)


def _write_shard(groups: Iterator[pa.Table], columns: pa.Schema, folder: Path, path: str, rows_in_group: int) -> Shard:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    content, lookups = hashlib.sha256(), dict[str, Lookups]()
    # Of integers packed differences are written and read faster than dictionaries and take less room; after them, lz4
    # takes a quarter less time to read than zstd, for a fortieth more bytes.
    with (
        sink(folder / path) as file,
        pq.ParquetWriter(
            file,
            columns.with_metadata({**columns.metadata, SHARD_KEY: path.encode()}),
            compression="lz4",
            use_dictionary=False,
            column_encoding=_encodings(columns),
            write_page_checksum=True,
        ) as writer,
    ):
        for table in groups:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            num_rows += table.num_rows
            for field, column in zip(columns, table.itercolumns(), strict=True):
                values = _values(content, field, column)
                if field.metadata:
                    found = _count(values, field.metadata)
                    lookups[field.name] = lookups[field.name] + found if field.name in lookups else found
    return Shard(
        path=path,
        num_rows=num_rows,
        footer=footer_digest(folder / path),
        group_rows=rows_in_group,
        content=content.hexdigest(),
        lookups=lookups or None,
    )


def _encodings(columns: pa.Schema) -> str | dict[str, str]:
    """Return how columns are encoded: one way for all integers, or a way for the path of each."""
    if not any(_is_floating(field) for field in columns):
        return "DELTA_BINARY_PACKED"
    found = {}
    for field in columns:
        path = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        found[path] = "PLAIN" if _is_floating(field) else "DELTA_BINARY_PACKED"
    return found


def _is_floating(field: pa.Field) -> bool:
    return bool(pa.types.is_floating(field.type.value_type if pa.types.is_list(field.type) else field.type))


def _values(content: hashlib._Hash, field: pa.Field, column: pa.ChunkedArray) -> np.ndarray:
    """Return the values of a column of a row group, items of lists one after another, and feed them to a digest.

    The digest does not depend on the chunks and buffers that the values lie in.
    """
    content.update(f"{field.name} {len(column)}".encode())
    if pa.types.is_list(field.type):
        content.update(pc.list_value_length(column).to_numpy())
        column = pc.list_flatten(column)
    values: np.ndarray = column.to_numpy()
    content.update(np.ascontiguousarray(values).data)
    return values


def _count(ids: np.ndarray, special: Mapping[bytes, bytes]) -> Lookups:
    counts = {key.decode(): int((ids == int(value)).sum()) for key, value in special.items()}
    return Lookups(total=len(ids), **counts)


def split_folder(schema: Schema, split: str) -> str:
    """Return where the shards of a split lie within the dataset."""
    return split if schema.days is None else f"{DAYS_FOLDER}/{split}"


def write_splits(
    schema: Schema,
    counts: dict[str, dict[str, int]],
    batches: Iterator[pa.RecordBatch],
    folder: Path,
    progress: Callable[[str, int], None],
) -> Schema:
    """Write the shards from ``batches``, which hold the splits one after the other; the schema with them.

    Args:
        counts: ``rows`` of every split.
        progress: called after each split with its rows.
    """
    held: list[pa.RecordBatch] = []
    splits: dict[str, Split] = {}
    for name, split in schema.splits.items():
        rows = counts[name]["rows"]
        place = split_folder(schema, name)
        shards = write_shards(_take(batches, rows, held), arrow_schema(schema), folder, place, row_group_rows(rows))
        splits[name] = split.written(shards)
        progress(f"wrote {name}", rows)
    return schema.model_copy(update={"splits": splits})


def _take(batches: Iterator[pa.RecordBatch], rows: int, held: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the next ``rows`` rows; ``held`` carries what is left of a batch to the next call."""
    while rows:
        batch = held.pop() if held else next(batches)
        if batch.num_rows > rows:
            held.append(batch.slice(rows))
        head = batch.slice(0, rows)
        rows -= head.num_rows
        yield head


def footer_digest(path: Path) -> str:
    """Return the sha256 of the metadata at the end of a parquet file, read without the parquet library.

    Raises:
        UserError: not a regular file, or no parquet file.
        OSError: unreadable.
    """
    if path.exists() and not path.is_file():
        raise UserError("not a regular file")
    with path.open("rb") as file:
        # The file ends with the metadata, its length in four bytes, and the word PAR1.
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        if length + 8 > size:
            raise UserError("it does not end as a parquet file does")
        file.seek(size - 8 - length)
        return hashlib.sha256(file.read(length)).hexdigest()


def _exact_tables(batches: Iterable[pa.RecordBatch], columns: pa.Schema, rows: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    held_rows = 0
    for batch in batches:
        # `select` fixes the order, `cast` the types: engines differ in both.
        batch = batch.select(columns.names).cast(columns)
        while held_rows + batch.num_rows >= rows:
            head = batch.slice(0, rows - held_rows)
            yield pa.Table.from_batches([*held, head])
            batch = batch.slice(head.num_rows)
            held, held_rows = [], 0
        if batch.num_rows:
            held.append(batch)
            held_rows += batch.num_rows
    if held:
        yield pa.Table.from_batches(held)


@contextmanager
def new_dataset(place: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a local folder for all but the shards, and a folder for the shards, that become the dataset ``place``.

    On this machine both are a ``new_folder``. An object store cannot rename: the shards go where they stay, the rest
    follows at the end, and ``schema.json``, without which there is no dataset, comes last.

    Raises:
        UserError: there is something at ``place``.
    """
    if is_local(place):
        with new_folder(place) as folder:
            yield folder, folder
        return
    _refuse_full(place)
    with tempfile.TemporaryDirectory(prefix="ssr_rec.") as work:
        folder = Path(work)
        try:
            yield folder, place
            files = [path for path in folder.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == SCHEMA_FILE):
                copy = place / path.relative_to(folder).as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        except BaseException:
            _remove(place)
            raise


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; choose another folder or remove this one")


def _remove(folder: Path) -> None:
    """Remove a folder of an object store and what is in it."""
    if folder.exists():
        folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that becomes ``folder`` on success and vanishes on failure.

    Raises:
        UserError: ``folder`` exists and is not an empty folder.
    """
    _refuse_full(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield work
        work.chmod(0o755)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders for ``folder`` of processes that were killed: their locks went with them."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp names them
    for path in folder.parent.iterdir():
        # One that was made a moment ago may not be locked yet.
        if not ours.fullmatch(path.name) or not path.is_dir() or time.time() - path.stat().st_mtime < YOUNG_S:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)
        print(f"removing {path}, which a killed process has left", file=sys.stderr)
        shutil.rmtree(path, ignore_errors=True)
