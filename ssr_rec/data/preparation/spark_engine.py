"""Prepares on many machines with Spark, local or on a cluster. Needs pyspark, the extra ``spark`` of the package.

Input files are parsed and shards are written by the executors; the driver holds vocabularies and counts, never rows.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlglot as sg
import sqlglot.expressions as sge
from ibis.backends.pyspark import Backend as SparkBackend
from ibis.backends.pyspark.datatypes import PySparkSchema
from ibis.backends.sql.compilers.pyspark import PySparkCompiler
from ibis.expr import datatypes as dt
from ibis.expr.types import IntegerValue, Table
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as pt

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.duckdb_engine import limit_bytes, open_duckdb
from ssr_rec.data.preparation.encode import transformed
from ssr_rec.data.preparation.engine import ROW, OpenSource, Progress, ahead
from ssr_rec.data.preparation.spark_tasks import (
    FILE,
    POSITION,
    SHARD,
    ReadFiles,
    ShardTask,
    WriteShard,
    c_ln,
    c_transformed,
    refusal,
)
from ssr_rec.data.preparation.split import ORDER, SPLIT
from ssr_rec.data.schema import Schema
from ssr_rec.data.shards import arrow_schema, row_group_rows, rows_in_shard, split_folder
from ssr_rec.data.splits import Shard

BROADCAST_BYTES = 2**25
"""A table in memory up to so many bytes goes whole to every executor when rows look it up."""
COARSE_BITS = 46
"""``ORDER`` without so many low bits is 65,536 values, few enough to count on the driver."""

# Two attempts at a shard would write one file.
_START_SETTINGS = {"spark.speculation": "false", "spark.ui.showConsoleProgress": "false"}


class _Compiler(PySparkCompiler):
    def visit_Ln(self, op: Any, *, arg: Any) -> Any:
        # Java's logarithm differs from C's in the last bit for one number in a hundred, which moves some of the numbers
        # that lie on the edge of a bucket, so the executors ask Arrow, which asks C.
        return self.f.anon.c_ln(arg)

    def visit_ArrayMap(self, op: Any, *, arg: Any, param: Any, body: Any, index: Any) -> Any:
        # A function of Python has no place in a lambda, so that it is one of the lists.
        if op.body == transformed(op.param.to_expr()).op():
            return self.f.anon.c_transformed(arg)
        return super().visit_ArrayMap(op, arg=arg, param=param, body=body, index=index)

    def visit_ExtractMicrosecond(self, op: Any, *, arg: Any) -> Any:
        # Ibis 12 knows none for Spark.
        return self.f.anon.pmod(
            self.f.anon.unix_micros(self.cast(arg, dt.Timestamp(timezone="UTC"))), sge.convert(10**6)
        )

    def visit_IsInf(self, op: Any, *, arg: Any) -> Any:
        # Ibis 12 compares the two terms of the query itself here, and says that no number is infinite.
        return sg.or_(arg.eq(self.POS_INF), arg.eq(self.NEG_INF))

    def visit_NonNullLiteral(self, op: Any, *, value: Any, dtype: dt.DataType) -> Any:
        # A bare number is an int to Spark, and so would be what is computed with it.
        if dtype.is_int64():
            return self.cast(sge.convert(value), dtype)
        return super().visit_NonNullLiteral(op, value=value, dtype=dtype)


class _Backend(SparkBackend):
    compiler = _Compiler()

    def to_pyarrow(self, expr: Any, /, **options: Any) -> Any:
        # Ibis goes through pandas, where a missing number is NaN.
        found = self._session.sql(self.compile(table := expr.as_table())).toArrow()
        return expr.__pyarrow_result__(found.cast(table.schema().to_pyarrow()))


@contextmanager
def connect(master: str | None, settings: Mapping[str, str], memory_limit: str) -> Iterator[SparkEngine]:
    """Yield an engine on the Spark at ``master`` (None: what spark-submit says, else this machine).

    A Spark session that this process has already is used, and left running.

    Args:
        settings: of Spark, as ``--conf`` of spark-submit.
        memory_limit: of the heap of a local Spark, and of each task's parser.

    Raises:
        UserError: Spark does not start, or what a task refused.
    """
    # Said of every call, of parts of Spark that are not used here.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
    running = SparkSession.getActiveSession()
    base = running or start(master, settings, memory_limit)
    # Views and settings of its own.
    session = base.newSession()
    # An overflow is an error and not another number.
    session.conf.set("spark.sql.ansi.enabled", "true")
    arrow_udf: Any = F.arrow_udf
    session.udf.register("c_ln", arrow_udf(c_ln, pt.DoubleType()))
    session.udf.register("c_transformed", arrow_udf(c_transformed, pt.ArrayType(pt.DoubleType())))
    number = "cast(conv(digits, 16, 10) as bigint)"
    session.sql(f"create temporary function hex_number(digits string) returns bigint return {number}")
    engine = SparkEngine(session, memory_limit)
    try:
        yield engine
    except (PySparkException, Py4JError) as error:
        raise UserError(refusal(error) or f"Spark: {_shown(error)}") from error
    finally:
        engine.release()
        if running is None:
            base.stop()


def start(master: str | None, settings: Mapping[str, str], memory_limit: str) -> SparkSession:
    """Return a Spark session, see ``connect``."""
    builder = SparkSession.builder.appName("ssr_rec prepare_data")
    if master is None and "PYSPARK_GATEWAY_PORT" not in os.environ:  # not under spark-submit
        master = "local[*]"
    if master is not None:
        builder = builder.master(master)
    for key, value in _START_SETTINGS.items():
        builder = builder.config(key, value)
    if master is not None and master.startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.config("spark.driver.memory", f"{_mebibytes(memory_limit)}m")
    for key, value in settings.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # py4j's and the JVM's own kinds
        raise UserError(
            f"--engine spark, --spark-master {master}: Spark does not start ({_shown(error)}); it needs Java 17 or "
            "newer, in JAVA_HOME or on the PATH, and a master that answers"
        ) from None
    session.sparkContext.setLogLevel("ERROR")
    return session


class SparkEngine:
    """See ``Engine``."""

    def __init__(self, session: SparkSession, memory_limit: str) -> None:
        self.session, self.memory_limit = session, memory_limit
        _Backend.register_options()
        self.backend = _Backend().connect(session)
        self._kept: list[DataFrame] = []

    def stage(
        self, name: str, files: Sequence[Path], open_source: OpenSource, progress: Progress
    ) -> tuple[Table, list[tuple[Path, int]]]:
        types = self._types(files[0], open_source)
        fields = PySparkSchema.from_ibis(types).fields
        read = ReadFiles(files, open_source, types, self.memory_limit)
        place = [pt.StructField(FILE, pt.IntegerType()), pt.StructField(POSITION, pt.LongType())]
        # One task a file. What is lost of the table is read again, and rows are numbered within their file, so
        # that they have the same numbers whenever and wherever that is.
        rows = self._keep(
            self.session.range(0, len(files), 1, len(files)).mapInArrow(read, pt.StructType([*fields, *place]))
        )
        counted = rows.groupBy(FILE).count().toArrow()
        counts = np.zeros(len(files), dtype=np.int64)
        counts[counted[FILE].to_numpy()] = counted["count"].to_numpy()
        ends = np.cumsum(counts)
        start = F.element_at(F.lit((ends - counts).tolist()).cast("array<bigint>"), F.col(FILE) + 1)
        numbered = rows.withColumn(ROW, start + F.col(POSITION))
        progress(f"read {len(files)} files", int(ends[-1]))
        return self._named(name, numbered.select(ROW, *types)), list(zip(files, ends.tolist(), strict=True))

    def _types(self, path: Path, open_source: OpenSource) -> ibis.Schema:
        """Return the types of a file's columns, as Spark has them."""
        with _duckdb(self.memory_limit) as connection:
            types = open_source(connection, path).rows.schema()
        try:
            return ibis.schema({name: _spark_type(name, kind) for name, kind in types.items()})
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    def numbered(self, table: Table, columns: Sequence[str]) -> Table:
        return table.select(ROW, *(name for name in columns if name != ROW))

    def with_column(self, table: Table, name: str, needed: Sequence[str], compute: Callable[[Table], Table]) -> Table:
        # Not kept: cheaper to compute again than to store.
        return self.create_view(f"with{name}", compute(table).select(*table.columns, name))

    def store(self, name: str, rows: pa.Table) -> Table:
        frame = self.session.createDataFrame(rows)
        return self._named(name, F.broadcast(frame) if rows.nbytes <= BROADCAST_BYTES else frame)

    def create_table(self, name: str, rows: Table) -> Table:
        return self._named(name, self._keep(self._frame(rows)))

    def in_parts(self, name: str, rows: Table, compute: Callable[[Table], Table], progress: Progress) -> Table:
        return compute(rows)

    def create_view(self, name: str, rows: Table) -> Table:
        return self._named(name, self._frame(rows))

    def results(self, queries: Iterable[Table]) -> Iterator[pa.Table]:
        # Several at once, as small jobs leave cores idle.
        return ahead((self._frame(query).toArrow for query in queries), 3)

    def write(
        self,
        schema: Schema,
        encoded: Table,
        keys: Table,
        counts: dict[str, dict[str, int]],
        folder: Path,
        progress: Progress,
    ) -> Schema:
        planned = [shard for name in schema.splits for shard in _planned(schema, name, counts[name]["rows"])]
        firsts = self._first_orders(keys, list(schema.splits), planned)
        # One shuffle of the rows: each shard is a partition, and a task sorts and writes it.
        rows = self._frame(encoded.mutate(**{SHARD: _at_most(encoded[ORDER], encoded[SPLIT], firsts)}))
        parts = rows.repartitionById(len(planned), F.col(SHARD).cast("int")).sortWithinPartitions(ORDER)
        write = WriteShard(planned, arrow_schema(schema), folder)
        about = parts.mapInArrow(write, WriteShard.RESULT).collect()
        written = {row["number"]: Shard.model_validate_json(row["shard"]) for row in about}
        splits = {}
        for name, split in schema.splits.items():
            shards = [written[number] for number, shard in enumerate(planned) if shard.split == name]
            splits[name] = split.written(shards)
            progress(f"wrote {name}", counts[name]["rows"])
        return schema.model_copy(update={"splits": splits})

    def _first_orders(self, keys: Table, splits: list[str], planned: list[ShardTask]) -> list[tuple[int, int]]:
        """Return (SPLIT, ORDER) of the first row of each shard; of the first shard of a split, (SPLIT, 0).

        A row's place in the shuffle is how many lie before it. Counts of coarse steps say in which step the wanted
        place is, and only the rows of those steps come to the driver.
        """
        places = [0]
        for before, shard in pairwise(planned):
            places.append(places[-1] + before.num_rows if before.split == shard.split else 0)
        wanted = [(splits.index(shard.split), place) for shard, place in zip(planned, places, strict=True)]
        several = sorted({split for split, place in wanted if place})
        if not several:
            return [(split, 0) for split, _ in wanted]
        keys = keys.filter(keys[SPLIT].isin(several)).mutate(coarse=keys[ORDER] >> COARSE_BITS)
        counted = keys.group_by([SPLIT, "coarse"]).agg(count=lambda t: t.count()).to_pyarrow()
        counted = counted.sort_by([(SPLIT, "ascending"), ("coarse", "ascending")])
        steps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for split in several:
            own = counted.filter(pc.equal(counted[SPLIT], split))
            steps[split] = own["coarse"].to_numpy(), np.cumsum(own["count"].to_numpy())
        firsts = []
        for split, place in wanted:
            if place == 0:
                firsts.append((split, 0))
                continue
            coarse, upto = steps[split]
            step = int(np.searchsorted(upto, place, side="right"))
            inside = keys.filter((keys[SPLIT] == split) & (keys["coarse"] == int(coarse[step]))).select(ORDER)
            orders = np.sort(inside.to_pyarrow()[ORDER].to_numpy())
            firsts.append((split, int(orders[place - (int(upto[step - 1]) if step else 0)])))
        return firsts

    def release(self) -> None:
        """Forget the tables that were kept."""
        for frame in self._kept:
            frame.unpersist()

    def _frame(self, rows: Table) -> DataFrame:
        return self.session.sql(self.backend.compile(rows))

    def _keep(self, frame: DataFrame) -> DataFrame:
        self._kept.append(frame.persist())
        return frame

    def _named(self, name: str, frame: DataFrame) -> Table:
        frame.createOrReplaceTempView(name)
        return self.backend.table(name)


def _planned(schema: Schema, split: str, rows: int) -> list[ShardTask]:
    in_group = row_group_rows(rows)
    most = rows_in_shard(in_group)
    return [
        ShardTask(split, f"{split_folder(schema, split)}/{number:05d}.parquet", min(most, rows - first), in_group)
        for number, first in enumerate(range(0, rows, most))
    ]


def _at_most(order: IntegerValue, split: IntegerValue, firsts: Sequence[tuple[int, int]], base: int = 0) -> Any:
    """Return the number of the last of ``firsts``, which rise, that is not beyond (``split``, ``order``)."""
    if len(firsts) == 1:
        return ibis.literal(base, "int32")
    middle = len(firsts) // 2
    first_split, first_order = firsts[middle]
    before = (split < first_split) | ((split == first_split) & (order < first_order))
    return before.ifelse(
        _at_most(order, split, firsts[:middle], base), _at_most(order, split, firsts[middle:], base + middle)
    )


def _spark_type(name: str, kind: dt.DataType) -> dt.DataType:
    """Return the nearest type that Spark has; values have the same text in it."""
    if isinstance(kind, dt.Array):
        return dt.Array(_spark_type(name, kind.value_type))
    if kind.is_unsigned_integer() and not kind.is_uint64():
        return dt.int64
    if kind.is_timestamp() and kind.timezone is None:
        return dt.Timestamp(scale=6)
    if kind.is_uint64() or kind.is_timestamp():
        raise UserError(f"column {name!r} holds {kind}, which Spark lacks; write int64, or moments without a zone")
    return kind


@contextmanager
def _duckdb(memory_limit: str) -> Iterator[Any]:
    connection = open_duckdb(Path(os.devnull), memory_limit, 1)
    try:
        yield connection
    finally:
        connection.disconnect()


def _mebibytes(size: str) -> int:
    """Return the mebibytes of a size as DuckDB takes it."""
    with _duckdb(size) as connection:
        return round(limit_bytes(connection) / 2**20)


def _shown(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:300]
