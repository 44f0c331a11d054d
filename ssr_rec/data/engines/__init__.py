"""The engines of the preparation, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ssr_rec.data.engine import Engine
from ssr_rec.data.engines import duck


@dataclass(frozen=True)
class SparkSettings:
    """Which Spark to prepare on.

    Attributes:
        master: as ``--master`` of spark-submit; None: what spark-submit says, else this machine.
        settings: as ``--conf`` of spark-submit.
    """

    master: str | None = None
    settings: dict[str, str] = field(default_factory=dict)


@contextmanager
def connect(
    spill: Path, memory_limit: str, threads: int | None, files: Sequence[Path], spark: SparkSettings | None = None
) -> Iterator[Engine]:
    """An engine: DuckDB, or with ``spark`` that Spark. See ``duck.connect`` and ``spark.connect``.

    Raises:
        ValueError: also pyspark is not installed.
    """
    if spark is None:
        with duck.connect(spill, memory_limit, threads, files) as engine:
            yield engine
        return
    if threads is not None:
        raise ValueError("--threads is for DuckDB; cores of Spark stand in --spark-master local[N] or its settings")
    try:
        from ssr_rec.data.engines import spark as spark_engine
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("pyspark", "py4j"):
            raise
        raise ValueError(
            "--engine spark needs pyspark, which is not installed; in the checkout run: pip install -e '.[spark]'"
        ) from None
    with spark_engine.connect(spark.master, spark.settings, memory_limit) as on_spark:
        yield on_spark
