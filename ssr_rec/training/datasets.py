"""Opens what a run trains on and evaluates: a dataset's splits, or its days in order, each next day first evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig
from ssr_rec.data.day_stream import Course, DayStream
from ssr_rec.data.oov_dropout import OovDropout, oov_shares
from ssr_rec.data.reader import Reader, check_rows
from ssr_rec.data.schema import SPLITS, Schema
from ssr_rec.data.synthetic.write import ensure_synthetic
from ssr_rec.data.value_columns import value_column


def draw_synthetic(config: RunConfig, progress: Callable[[int, int], None]) -> Path:
    """Return the folder of the synthetic log, drawn by whoever comes first."""
    folder = ensure_synthetic(config.data.synthetic, Path(config.data.synthetic_root), progress)
    dist.barrier()
    return folder


def open_reader(
    config: RunConfig,
    folder: Path,
    schema: Schema,
    split: str,
    rank: int,
    world_size: int,
    to_train: bool | None = None,
) -> Reader:
    """Return a split for this rank, shuffled ``to_train`` or in order to evaluate; None: as its name says."""
    is_train = split == "train" if to_train is None else to_train
    shares = oov_shares(config.data.oov_dropout, schema, config.domain_of_parts) if is_train else {}
    by = value_column(schema, config.metrics_by, folder) if config.metrics_by and not is_train else None
    return Reader(
        folder,
        schema,
        split,
        batch_size=config.train.batch_size if is_train else config.train.eval_batch_size,
        ranks=(rank, world_size),
        num_lanes=config.data.num_lanes,
        seed=config.seed if is_train and config.data.shuffle else None,
    ).reading(
        prefetch=config.data.prefetch,
        hide_new=not is_train,
        oov_dropout=OovDropout(shares, schema, split, config.seed) if shares else None,
        by=by,
    )


COUNTS = ("gauc_groups", "gauc_rows", "gauc_share", "ranking_groups", "ranking_share")
"""What evaluations say beside measures, of which a mean over days says nothing; that of bounds bounds the mean."""

Validation = Callable[[int], tuple[Reader, dict[str, Any]] | None]
"""What to evaluate after an epoch (-1: before the first), and what the row says of it; None: nothing."""
OpenSplit = Callable[[str, bool], Reader]
"""The reader of a split, to train on it (shuffled, ``train.batch_size``) or to evaluate it."""


@dataclass(frozen=True)
class Rows:
    """Holds what a run trains on and evaluates.

    Attributes:
        train: what to train on.
        validation: what to evaluate after an epoch.
        test: what to evaluate in the end; None: the days, evaluated before they were trained on, were the test.
        open_split: opens any split.
    """

    train: Course
    validation: Validation
    test: Reader | None
    open_split: OpenSplit


def open_rows(config: RunConfig, folder: Path, schema: Schema, rank: int = 0, world_size: int = 1) -> Rows:
    """Return this rank's part of the rows that ``data.path`` and ``data.days`` name.

    Raises:
        UserError: a dataset of days without ``data.days`` or the other way round, days that it does not have or that
            leave nothing to evaluate, settings that are not for days, and what ``Reader`` refuses.
    """

    def open_split(split: str, to_train: bool) -> Reader:
        return open_reader(config, folder, schema, split, rank, world_size, to_train)

    if config.data.days is None:
        if schema.days is not None:
            raise UserError(f"{folder}: its splits are days; train on them in order with data.days: all")
        readers = {split: open_split(split, split == "train") for split in SPLITS}
        return Rows(readers["train"], lambda epoch: (readers["validation"], {}), readers["test"], open_split)
    if schema.days is None:
        raise UserError(
            f"data.days={config.data.days}: {folder} is split into {', '.join(schema.splits)}; prepare the log with "
            "--days COLUMN, or remove data.days"
        )
    train = config.train
    for key, value in (("eval_every", train.eval_every), ("patience", train.patience)):
        if value is not None:
            raise UserError(f"train.{key}={value}: a day is evaluated once, when it is the next; set it to null")
    days = choose_days(config.data.days, schema.days.names)
    for day in days:
        check_rows(folder, schema, day, world_size)
    stream = DayStream(lambda day: open_split(day, True), schema, days, train.epochs, train.batch_size)
    fitted = set(schema.days.names[: schema.days.fitted])
    steps = stream.num_steps(train.epochs)
    last_epoch = stream.locate(min(train.max_steps or steps, steps) - 1)[0]
    first = 0 if config.warm_start else 1  # fresh weights have nothing to show on the first day
    evaluated = [day for day in days[first : last_epoch + 2] if day not in fitted]
    if not evaluated:
        raise UserError(
            f"data.days={config.data.days}: no next day to evaluate: the encodings are fitted on the first "
            f"{schema.days.fitted} of the days {schema.days.names[0]} to {schema.days.names[-1]}; take in later ones"
        )
    open_split(evaluated[0], False)  # refuses what it would refuse when a day has been trained on

    def next_day(epoch: int) -> tuple[Reader, dict[str, Any]] | None:
        day = days[epoch + 1] if epoch + 1 < len(days) else None
        return (open_split(day, False), {"day": day}) if day in evaluated and day is not None else None

    return Rows(stream, next_day, None, open_split)


def choose_days(wanted: str, days: Sequence[str]) -> list[str]:
    """Return ``all``, ``FIRST..LAST``, ``FIRST..`` or ``..LAST`` of ``days``.

    Raises:
        UserError: not of that form, or no such days.
    """
    if wanted == "all":
        return list(days)
    first, dots, last = wanted.partition("..")
    ends = [first or days[0], last or days[-1]]
    if not dots or not set(ends) <= set(days):
        raise UserError(f"data.days={wanted}: give all, FIRST..LAST, FIRST.. or ..LAST of {', '.join(days)}")
    chosen = list(days[days.index(ends[0]) : days.index(ends[1]) + 1])
    if not chosen:
        raise UserError(f"data.days={wanted}: {first} comes after {last}")
    return chosen


def mean_of_days(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return label -> measure -> mean over the days where it is defined, all days alike; nan where it never is.

    Days of many rows may be bounded and others exact: a bound is 0 of the latter, and what only some days have, such as
    XAUC, is left out.
    """
    means: dict[str, dict[str, float]] = {}
    for task in rows[0]["tasks"]:
        means[task], of_days = {}, [row["tasks"][task] for row in rows]
        for name in dict.fromkeys(name for measures in of_days for name in measures if name not in COUNTS):
            is_bound = name.endswith("_bound")
            if not is_bound and not all(name in measures for measures in of_days):
                continue
            values = [measures.get(name, 0.0 if is_bound else None) for measures in of_days]
            known = [value for value in values if value is not None and not math.isnan(value)]
            means[task][name] = sum(known) / len(known) if known else math.nan
    return means


def report_of_days(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return of validation rows by days: ``test``, their mean, ``metrics``, exact if all are, and ``days``."""
    mode = "exact" if all(row["metrics"] == "exact" for row in rows) else "bounded"
    # Days that were judged before there were deciles have none.
    kept = ("day", "step", "samples", "loss", "tasks", "metrics", "deciles", "by_value")
    days = [{key: row[key] for key in kept if key in row} for row in rows]
    return {"test": mean_of_days(rows), "metrics": mode, "days": days}
