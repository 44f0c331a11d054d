"""Makes histories from the log: for each row the events of the same user that are strictly earlier, the last of them.

A user's events are numbered by time and put into blocks of L, ``max_length``. The last L of a row's earlier events lie
in two neighbouring blocks, which two joins bring: no row is multiplied by its events, and no user's history is ever
whole in memory. All of it is Ibis expressions, the same for every engine.
"""

from __future__ import annotations

import ibis
from ibis.expr.types import ArrayValue, Column, Table

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import LogBuckets
from ssr_rec.data.preparation.encode import POSITION_BITS, bucket_items
from ssr_rec.data.preparation.engine import ROW, Engine
from ssr_rec.data.preparation.sequence_spec import SequenceSpec
from ssr_rec.data.preparation.spec import TableSpec
from ssr_rec.data.preparation.split import TIME, Numbers, with_time
from ssr_rec.data.preparation.where import holds, parse_where


def helpers(spec: TableSpec) -> list[str]:
    """Return the columns that ``with_keys`` adds."""
    count = len(spec.histories)
    return [ROW, *(f"__{kind}{at}__" for at in range(count) for kind in ("by", "at", "is"))] if count else []


def check_histories(rows: Table, spec: TableSpec) -> None:
    """Refuse conditions that do not fit the columns.

    Raises:
        UserError: they do not.
    """
    for history in spec.histories.values():
        if history.where is not None:
            holds(rows, parse_where(history.where))


def with_keys(rows: Table, spec: TableSpec, whole: dict[str, Numbers]) -> Table:
    """Return ``rows`` with what histories go by: whose a row is, its time, and whether it is an event."""
    for at, settings in enumerate(spec.histories.values()):
        timed = with_time(rows, settings.order, whole[settings.order])
        # Text sorts as it is. Moments become microseconds, since an engine may keep finer ones and the other not.
        is_text = timed[TIME].type().is_string() and not settings.age
        moment = timed[TIME] if is_text else number_of_time(timed[TIME], settings.order)[0]
        is_event = holds(timed, parse_where(settings.where)) if settings.where is not None else ibis.literal(True)
        keys = {f"__by{at}__": timed[settings.by], f"__at{at}__": moment, f"__is{at}__": is_event}
        rows = timed.mutate(**keys).drop(TIME) if TIME not in rows.columns else timed.mutate(**keys)
    return rows


def age_units(rows: Table, spec: TableSpec, whole: dict[str, Numbers]) -> dict[str, float]:
    """Return feature of ages -> the unit of ``number_of_time``."""
    orders = {name: history.order for name, history in spec.histories.items() if history.age}
    return {
        f"{name}_age": number_of_time(with_time(rows, order, whole[order])[TIME], order)[1]
        for name, order in orders.items()
    }


def number_of_time(time: Column, name: str) -> tuple[Column, float]:
    """Return a time as an exact number, int64 or float64, and how many of its units make one of an age.

    Microseconds of moments and dates, a million of which are a second; numbers as they are.

    Raises:
        UserError: text.
    """
    kind = time.type()
    if kind.is_timestamp() or kind.is_date():
        moment = time.cast("timestamp")
        # Cut first: of the parts of a second, one engine rounds them and the other cuts them off.
        whole = moment.truncate("s").epoch_seconds().cast("int64")
        return whole * 1_000_000 + moment.microsecond().cast("int64"), 1e6
    if not kind.is_numeric():
        raise UserError(
            f"time column {name!r} holds {kind}, which has no ages: set age: false, or give numbers or moments"
        )
    return time.cast("int64" if kind.is_integer() else "float64"), 1.0


def add_histories(
    engine: Engine, encoded: Table, spec: TableSpec, ages: dict[str, LogBuckets], units: dict[str, float]
) -> Table:
    """Return the encoded rows, which have ``helpers``, with the features of every history that is made from the log.

    Args:
        encoded: a table that is there, not an expression.
        ages: feature -> encoding of the ages.
        units: feature -> units of the times' numbers that make one of an age.
    """
    for at, (name, history) in enumerate(spec.histories.items()):
        rows = _with_history(encoded, at, name, spec.sequences[name])
        age = f"{name}_age"
        if history.age:
            passed = _since(rows[age], rows[f"__at{at}__"], units[age])
            rows = rows.mutate(**{age: bucket_items(passed, ages[age])})
        encoded = engine.create_table(f"histories{at}", rows)
    return encoded.drop(*helpers(spec))


def _since(times: ArrayValue, moment: Column, unit: float) -> ArrayValue:
    """Return the ages (float64) at a row's moment of what happened at ``times``."""
    passed = times.map(lambda time: (moment - time).cast("float64"))
    return passed if unit == 1.0 else passed.map(lambda number: number / unit)


def _with_history(rows: Table, at: int, name: str, sequence: SequenceSpec) -> Table:
    """Return ``rows`` with the columns of one history; that of the age holds the events' times."""
    by, moment, is_event, most = f"__by{at}__", f"__at{at}__", f"__is{at}__", sequence.max_length
    of_user = ibis.range_window(group_by=by, order_by=moment, preceding=None, following=0)
    of_moment = ibis.window(group_by=[by, moment])
    found = rows[is_event].cast("int64")
    counted = rows.mutate(__upto__=found.sum().over(of_user), __same__=found.sum().over(of_moment))
    counted = counted.mutate(__before__=(counted["__upto__"] - counted["__same__"]).cast("int64"))
    counted = counted.mutate(__last__=ibis.greatest(counted["__before__"] - 1, 0) // most)
    counted = counted.mutate(__last__=counted["__last__"].cast("int64"))
    counted = counted.mutate(__first__=(counted["__last__"] - 1).cast("int64"))

    events = rows.filter(rows[is_event])
    number = ibis.row_number().over(ibis.window(group_by=by, order_by=[moment, ROW])).cast("int64")
    events = events.mutate(__number__=number)
    events = events.mutate(__block__=(events["__number__"] // most).cast("int64"))
    events = events.mutate(__place__=(events["__number__"] % most).cast("int64"))
    sources = {f"__c{i}__": source for i, source in enumerate(sequence.made(name).values())}
    # Grouping forgets the order: the place travels in the high bits of an id, and times are in order once sorted.
    collected = {
        column: (
            events[moment] if source is None else events["__place__"] * 2**POSITION_BITS + events[source].cast("int64")
        ).collect()
        for column, source in sources.items()
    }
    blocks = events.group_by([by, "__block__"]).agg(**collected)
    blocks = blocks.mutate(**{column: blocks[column].sort() for column in sources})

    joined = counted
    for side, key in (("new", "__last__"), ("old", "__first__")):
        part = blocks.rename(
            {f"__{side}_by__": by, f"__{side}_block__": "__block__"} | {f"__{side}{c}": c for c in sources}
        )
        fits = [joined[by] == part[f"__{side}_by__"], joined[key] == part[f"__{side}_block__"]]
        joined = joined.left_join(part, fits)
    # Of the newer block the events before the row, of the older one as many as are still wanted.
    cut = joined["__before__"] - joined["__last__"] * most
    columns: dict[str, Column] = {}
    for (column, source), feature in zip(sources.items(), sequence.made(name), strict=True):
        kind = joined[f"__new{column}"].type()
        empty = ibis.literal([], type=kind)
        newer = ibis.coalesce(joined[f"__new{column}"], empty)[:cut]
        older = ibis.coalesce(joined[f"__old{column}"], empty)[cut:]
        whole = older.concat(newer)
        is_id = source is not None
        columns[feature] = whole.map(lambda item: item & (2**POSITION_BITS - 1)) if is_id else whole
    return joined.select(*rows.columns, **columns)
