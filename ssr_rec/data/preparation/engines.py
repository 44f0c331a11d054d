"""Defines the settings of the preparation's engines, and chooses between the engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation import duckdb_engine as duck
from ssr_rec.data.preparation.engine import Engine


@dataclass(frozen=True)
class SparkSettings:
    """Says which Spark to prepare on.

    Attributes:
        master: as ``--master`` of spark-submit; None: what spark-submit says, else this machine.
        settings: as ``--conf`` of spark-submit.
    """

    master: str | None = None
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSettings:
    """Says what a log is prepared with.

    Attributes:
        memory_limit: of the engine, which spills to a temporary folder beside the output beyond it, or of the system.
        threads: of DuckDB; None: all cores.
        spark: prepare on this Spark instead of DuckDB; the result is the same.
    """

    memory_limit: str = "3GB"
    threads: int | None = None
    spark: SparkSettings | None = None


@contextmanager
def connect(spill: Path, files: Sequence[Path], settings: EngineSettings) -> Iterator[Engine]:
    """Yield an engine: DuckDB, or with ``spark`` that Spark. See ``duck.connect`` and ``spark.connect``.

    Raises:
        UserError: also pyspark is not installed.
    """
    memory_limit, threads, spark = settings.memory_limit, settings.threads, settings.spark
    if spark is None:
        with duck.connect(spill, memory_limit, threads, files) as engine:
            yield engine
        return
    if threads is not None:
        raise UserError("--threads is for DuckDB; cores of Spark stand in --spark-master local[N] or its settings")
    try:
        from ssr_rec.data.preparation import spark_engine
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("pyspark", "py4j"):
            raise
        raise UserError(
            "--engine spark needs pyspark, which is not installed; in the checkout run: pip install -e '.[spark]'"
        ) from None
    with spark_engine.connect(spark.master, spark.settings, memory_limit) as on_spark:
        yield on_spark
