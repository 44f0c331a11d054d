"""What a run trains on and evaluates: a dataset's three splits, or its days in order, each next day first evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ssr_rec.config import RunConfig
from ssr_rec.data.course import Course, DayStream
from ssr_rec.data.reader import Reader, check_rows
from ssr_rec.evaluation import run_steps
from ssr_rec.over_archs import OverArch
from ssr_rec.report import capture_inputs
from ssr_rec.schema import SPLITS, Schema
from ssr_rec.trainer import Validation

MEANS = ("auc", "auc_bound", "gauc", "gauc_bound", "logloss", "ne", "calibration")
"""Measures of which a mean over days says something; of two bounds, it bounds the mean."""

OpenSplit = Callable[[str, bool], Reader]
"""The reader of a split, to train on it (shuffled, ``train.batch_size``) or to evaluate it."""


@dataclass(frozen=True)
class Rows:
    """Attributes:
    train: what to train on.
    validation: what to evaluate after an epoch.
    test: what to evaluate in the end; None: the days, evaluated before they were trained on, were the test.
    """

    train: Course
    validation: Validation
    test: Reader | None


def open_rows(config: RunConfig, folder: Path, schema: Schema, world_size: int, open_split: OpenSplit) -> Rows:
    """The rows that ``data.path`` and ``data.days`` name.

    Raises:
        ValueError: a dataset of days without ``data.days`` or the other way round, days that it does not have or that
            leave nothing to evaluate, settings that are not for days, and what ``Reader`` refuses.
    """
    if config.data.days is None:
        if schema.days is not None:
            raise ValueError(f"{folder}: its splits are days; train on them in order with data.days: all")
        readers = {split: open_split(split, split == "train") for split in SPLITS}
        return Rows(readers["train"], lambda epoch: (readers["validation"], {}), readers["test"])
    if schema.days is None:
        raise ValueError(
            f"data.days={config.data.days}: {folder} is split into {', '.join(schema.splits)}; prepare the log with "
            "--days COLUMN, or remove data.days"
        )
    train = config.train
    for key, value in (("eval_every", train.eval_every), ("patience", train.patience)):
        if value is not None:
            raise ValueError(f"train.{key}={value}: a day is evaluated once, when it is the next; set it to null")
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
        raise ValueError(
            f"data.days={config.data.days}: no next day to evaluate: the encodings are fitted on the first "
            f"{schema.days.fitted} of the days {schema.days.names[0]} to {schema.days.names[-1]}; take in later ones"
        )

    def next_day(epoch: int) -> tuple[Reader, dict[str, Any]] | None:
        day = days[epoch + 1] if epoch + 1 < len(days) else None
        return (open_split(day, False), {"day": day}) if day in evaluated and day is not None else None

    return Rows(stream, next_day, None)


def choose_days(wanted: str, days: Sequence[str]) -> list[str]:
    """``all``, ``FIRST..LAST``, ``FIRST..`` or ``..LAST`` of ``days``.

    Raises:
        ValueError: not of that form, or no such days.
    """
    if wanted == "all":
        return list(days)
    first, dots, last = wanted.partition("..")
    ends = [first or days[0], last or days[-1]]
    if not dots or not set(ends) <= set(days):
        raise ValueError(f"data.days={wanted}: give all, FIRST..LAST, FIRST.. or ..LAST of {', '.join(days)}")
    chosen = list(days[days.index(ends[0]) : days.index(ends[1]) + 1])
    if not chosen:
        raise ValueError(f"data.days={wanted}: {first} comes after {last}")
    return chosen


def mean_of_days(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Label -> measure -> mean over the days where it is defined, all days alike; nan where it never is."""
    means: dict[str, dict[str, float]] = {}
    for task, measures in rows[0]["tasks"].items():
        means[task] = {}
        for name in MEANS:
            values = [row["tasks"][task].get(name) for row in rows]
            known = [value for value in values if value is not None and not math.isnan(value)]
            if name in measures:
                means[task][name] = sum(known) / len(known) if known else math.nan
    return means


def report_of_days(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the validation rows of a run by days: ``test``, their mean, ``metrics``, exact if all are, and ``days``."""
    mode = "exact" if all(row["metrics"] == "exact" for row in rows) else "bounded"
    kept = ("day", "step", "samples", "loss", "tasks", "metrics")
    return {"test": mean_of_days(rows), "metrics": mode, "days": [{key: row[key] for key in kept} for row in rows]}


def first_inputs(
    pipeline: TrainPipelineSparseDist, model: nn.Module, over_arch: OverArch, reader: Reader
) -> list[Tensor]:
    """What reaches the over-arch for the first rows of ``reader``, ``[(b, F*D)]``. Collective."""
    batches = reader.epoch(0)
    model.eval()
    with capture_inputs(over_arch) as inputs, torch.no_grad():
        for _ in run_steps(pipeline, islice(batches, 1)):
            pass
    batches.close()
    model.train()
    return inputs
