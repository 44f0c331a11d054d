"""Describes the raw logs that tools/bench_pipeline.py has prepared by both sides, as each of them reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.presets import PRESETS
from ssr_rec.data.preparation.spec import read_spec

CRITEO_ROWS = 2_000_000
SPEC = Path(__file__).parents[1] / "configs" / "data" / "ml1m_half.yaml"
MIN_COUNT = 6
# FuxiCTR is given the three splits as files of their own; it does not shuffle.
SPLITS = {"train": "r % 10 < 8", "valid": "r % 10 = 8", "test": "r % 10 = 9"}


@dataclass(frozen=True)
class Log:
    """Describes a raw log: our preset or spec, and FuxiCTR's columns."""

    name: str
    raw: Path
    preset: str
    spec: str | None
    rows: str
    """What selects its rows, in SQL, with a row number ``r``."""
    fuxictr: dict[str, Any]

    def write_for_fuxictr(self, folder: Path) -> dict[str, Any]:
        """Write its three splits to ``folder``; the options of fuxictr_prepare.py. Not part of what is timed."""
        form = "header" if self.fuxictr["format"] == "csv" else "format parquet"
        for split, rule in SPLITS.items():
            file = folder / f"{split}.{self.fuxictr['format']}"
            try:
                duckdb.execute(f"copy (select * exclude r from ({self.rows}) where {rule}) to '{file}' ({form})")
            except duckdb.Error as error:
                raise UserError(f"{self.raw}: {str(error).splitlines()[0]}") from None
        return {**self.fuxictr, "folder": str(folder), "min_count": MIN_COUNT}


def criteo_log(given: Path, work: Path) -> Log:
    """Return a Criteo file repeated to ``CRITEO_ROWS`` rows."""
    text = given.read_bytes()
    raw = work / "criteo.tsv"
    if not raw.exists():
        with raw.open("wb") as file:
            for _ in range(max(1, CRITEO_ROWS // text.count(b"\n"))):
                file.write(text)
    spec = PRESETS["criteo"].spec
    names = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    types = {name: "varchar" if name in spec.categorical else "bigint" for name in names}
    rows = (
        f"select *, row_number() over () as r from read_csv('{raw}', delim='\t', header=false, columns={types}, "
        "quote='', escape='')"
    )
    columns = {"categorical": spec.categorical, "numeric": spec.numeric, "lists": {}, "label": "label"}
    return Log("criteo", raw, "criteo", None, rows, {**columns, "format": "csv"})


def ml1m_half_log(given: Path, work: Path) -> Log:
    """Return the ratings of configs/data/ml1m_half.yaml."""
    spec = read_spec(SPEC)
    # FuxiCTR takes ids as text, and lists as text with a separator.
    text = [f"{name}::varchar as {name}" for name in spec.categorical]
    text += [f"array_to_string({name}, '^') as {name}" for name in spec.lists]
    rows = f"select * replace ({', '.join(text)}), row_number() over () as r from '{given}'"
    lists = {name: column.max_length for name, column in spec.lists.items()}
    columns = {"categorical": spec.categorical, "numeric": [], "lists": lists, "label": spec.labels[0]}
    return Log("ml1m_half", given, "table", str(SPEC), rows, {**columns, "format": "parquet"})


FUXICTR_LOGS: dict[str, Callable[[Path, Path], Log]] = {"criteo": criteo_log, "ml1m_half": ml1m_half_log}
