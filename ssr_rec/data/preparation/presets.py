"""Says what each preset of `tools/prepare_data.py` reads and how: built-in specs, and a reading expression if needed.

Formats: Criteo Kaggle display advertising (2014), Avazu Kaggle (2014), Ali-CCP (Tianchi dataset 408).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ibis
from ibis.backends.duckdb import Backend
from ibis.expr.types import ArrayColumn, BooleanValue, Column, StringColumn, Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.column_types import cut_list, selected
from ssr_rec.data.preparation.engine import ROW, Engine, Progress, Source
from ssr_rec.data.preparation.sources import Log, Read, open_source, read_table, stage_all
from ssr_rec.data.preparation.spec import ListColumn, TableSpec, TextFormat


@dataclass(frozen=True)
class Preset:
    spec: TableSpec
    read: Read


_CRITEO_NUMBERS = [f"I{i}" for i in range(1, 14)]
_CRITEO_IDS = [f"C{i}" for i in range(1, 27)]
CRITEO = TableSpec(
    name="criteo",
    labels=["label"],
    numeric=_CRITEO_NUMBERS,
    categorical=_CRITEO_IDS,
    text=TextFormat(delimiter="\t", header=False, quote=False, columns=["label", *_CRITEO_NUMBERS, *_CRITEO_IDS]),
)

_AVAZU_SITE = ["site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"]
_AVAZU_DEVICE = ["device_id", "device_ip", "device_model", "device_type", "device_conn_type"]
AVAZU = TableSpec(
    name="avazu",
    labels=["click"],
    categorical=[
        *("hour_of_day", "weekday", "C1", "banner_pos"),
        *_AVAZU_SITE,
        *_AVAZU_DEVICE,
        *(f"C{i}" for i in range(14, 22)),
    ],
    # A row number, and the moment, of which hour_of_day and weekday are what recurs.
    ignore=["id", "hour"],
    text=TextFormat(delimiter=","),
)


def read_avazu(engine: Engine, files: list[Path], spec: TableSpec, progress: Progress) -> Log:
    """Return Avazu's CSV with ``hour_of_day`` (00 to 23) and ``weekday`` (0 Monday) made of ``hour`` (YYMMDDHH)."""
    return stage_all(engine, files, partial(_open_avazu, spec=spec), progress)


def _open_avazu(connection: Backend, path: Path, spec: TableSpec) -> Source:
    source = open_source(connection, path, spec.text, spec.labels)
    if "hour" not in source.rows.columns:
        raise UserError(f"{path}: no column 'hour'; an Avazu file begins with a header line")
    return selected(replace(source, rows=_with_hour_and_weekday(source.rows)), spec)


def _with_hour_and_weekday(rows: Table) -> Table:
    hour = rows["hour"]
    year, month, day = (hour.substr(first, 2).cast("int32") for first in (0, 2, 4))
    weekday = ibis.date(year + 2000, month, day).day_of_week.index()
    return rows.mutate(hour_of_day=hour.substr(6, 2), weekday=weekday.cast("string"))


_SKELETON = ["sample_id", "click", "pay", "common_index", "feature_count", "features"]
_COMMON = ["common_index", "feature_count", "features"]
_USER_SINGLE = ["101", "121", "122", "124", "125", "126", "127", "128", "129"]
_USER_LISTS = ["109_14", "110_14", "127_14", "150_14"]
_ITEM_SINGLE = ["205", "206", "207", "216", "508", "509", "702", "853", "301"]
_ITEM_LISTS = ["210"]
# The combination fields carry a strength besides their id; with them the log has the paper's 4 numerical features.
_ITEM_NUMBERS = {f"{field}_value": field for field in ("508", "509", "702", "853")}
ALIBABA = TableSpec(
    name="alibaba",
    labels=["click", "pay"],
    categorical=[*_USER_SINGLE, *_ITEM_SINGLE],
    numeric=list(_ITEM_NUMBERS),
    lists={field: ListColumn(max_length=20) for field in (*_USER_LISTS, *_ITEM_LISTS)},
    group_id="101",
    text=TextFormat(delimiter=",", header=False, quote=False, columns=_SKELETON),
)

Parse = Callable[[Table, ArrayColumn, TableSpec], dict[str, Column]]
"""Rows, their split feature lists, and the spec to the columns it uses."""

_ITEM, _FIELD, _VALUE = "\x01", "\x02", "\x03"


def read_alibaba(engine: Engine, files: list[Path], spec: TableSpec, progress: Progress) -> Log:
    """Read Ali-CCP: each ``sample_skeleton_X.csv`` joined by index with the ``common_features_X.csv`` beside it.

    A single-valued field that a row repeats keeps its first value; one it lacks is missing.

    Raises:
        UserError: files that do not pair, a feature count that is wrong, an index that is repeated or not found.
    """
    skeletons = [path for path in files if path.name.startswith("sample_skeleton")]
    commons = {_pair(path): path for path in files if path.name.startswith("common_features")}
    for path in files:
        if path not in skeletons and path not in commons.values():
            raise UserError(f"{path}: neither sample_skeleton_*.csv nor common_features_*.csv")
    for path in skeletons:
        if _pair(path) not in commons:
            raise UserError(f"{path}: common_features{_pair(path)} is not among the inputs; give both")
    if not skeletons:
        raise UserError(f"{', '.join(map(str, files))}: no sample_skeleton_*.csv among the inputs")
    common = _staged_common(engine, [commons[_pair(path)] for path in skeletons], spec, progress)
    log = _staged(engine, "skeleton", skeletons, _SKELETON, _item_columns, spec, progress)
    rows = log.rows(log.table.columns)
    joined = rows.left_join(common.rename(common_key="key"), rows["key"] == common["key"])
    _refuse(log, joined, joined["common_key"].isnull(), "common_index is not in the common_features file")
    return Log(engine, engine.create_table("log", joined.select(ROW, *spec.used)), log.files)


def _pair(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removeprefix("sample_skeleton").removeprefix("common_features")


def _staged_common(engine: Engine, files: list[Path], spec: TableSpec, progress: Progress) -> Table:
    log = _staged(engine, "common", files, _COMMON, _user_columns, spec, progress)
    rows = log.rows(["key"])
    firsts = rows.group_by("key").agg(first=rows[ROW].min())
    repeated = rows.anti_join(firsts, rows[ROW] == firsts["first"])
    _refuse(log, repeated, ibis.literal(True), "common_index is that of an earlier row; each must be unique")
    return log.table


def _staged(
    engine: Engine,
    table: str,
    files: list[Path],
    columns: list[str],
    parse: Parse,
    spec: TableSpec,
    progress: Progress,
) -> Log:
    """Stage the parsed columns of files of one kind, and ``key``, the index that pairs skeleton and common rows."""
    open_parsed = partial(_open_alibaba, spec=spec, columns=columns, parse=parse)
    log = stage_all(engine, files, open_parsed, progress, table)
    rows = log.rows(["wrong"])
    _refuse(log, rows, rows["wrong"], "feature_count is not the number of features in the list")
    return log


def _open_alibaba(connection: Backend, path: Path, spec: TableSpec, columns: list[str], parse: Parse) -> Source:
    form = spec.text.model_copy(update={"columns": columns})
    source = open_source(connection, path, form, {"feature_count", *spec.labels})
    rows = source.rows
    items = rows["features"].split(_ITEM)
    key = ibis.literal(f"{_pair(path)}/") + rows["common_index"].fill_null("")
    wrong = rows["feature_count"] != items.length().fill_null(0)
    return replace(source, rows=rows.select(key=key, wrong=wrong.fill_null(True), **parse(rows, items, spec)))


def _user_columns(rows: Table, items: ArrayColumn, spec: TableSpec) -> dict[str, Column]:
    singles = {field: _first(items, field) for field in _USER_SINGLE}
    return singles | {field: cut_list(_entries(items, field), spec.lists[field]) for field in _USER_LISTS}


def _item_columns(rows: Table, items: ArrayColumn, spec: TableSpec) -> dict[str, Column]:
    columns = {label: rows[label] for label in spec.labels}
    columns |= {field: _first(items, field) for field in _ITEM_SINGLE}
    columns |= {field: cut_list(_entries(items, field), spec.lists[field]) for field in _ITEM_LISTS}
    return columns | {name: _strength(items, field) for name, field in _ITEM_NUMBERS.items()}


def _of_field(items: ArrayColumn, field: str) -> ArrayColumn:
    return items.filter(lambda item: item.startswith(field + _FIELD))


def _entries(items: ArrayColumn, field: str) -> ArrayColumn:
    return _of_field(items, field).map(lambda item: item.split(_FIELD)[1].split(_VALUE)[0])


def _first(items: ArrayColumn, field: str) -> StringColumn:
    return _entries(items, field)[0]


def _strength(items: ArrayColumn, field: str) -> Column:
    return _of_field(items, field)[0].split(_VALUE)[1].cast("float64")


def _refuse(log: Log, rows: Table, wrong: BooleanValue, what: str) -> None:
    row = rows.aggregate(row=rows[ROW].min(where=wrong)).to_pyarrow()["row"][0].as_py()
    if row is not None:
        raise UserError(f"{log.where(row)}: {what}")


PRESETS = {
    "criteo": Preset(CRITEO, read_table),
    "avazu": Preset(AVAZU, read_avazu),
    "alibaba": Preset(ALIBABA, read_alibaba),
}
