"""Writes a run folder while its run is on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssr_rec.checkpointing.resume import Start, find_start
from ssr_rec.common.errors import UserError
from ssr_rec.common.formatting import decimal, short_number
from ssr_rec.common.logs import send_logs
from ssr_rec.common.whole_files import write_text
from ssr_rec.config.ranking import is_ranking
from ssr_rec.config.run import RunConfig, dump_config
from ssr_rec.data.day_stream import Course
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.histories import reading_of
from ssr_rec.embeddings.tables import table_dims
from ssr_rec.over_archs.base import OverArch
from ssr_rec.runs.folder import CONFIG_FILE, append_jsonl
from ssr_rec.runs.measures import main_measure, title
from ssr_rec.runs.open import open_run_folder
from ssr_rec.runs.progress_line import Progress
from ssr_rec.runs.tracking import Trackers, check_trackers
from ssr_rec.training.stall_watch import Preempted


class RunLog:
    """Keeps the run folder while the run is on: rank 0 writes, the others agree.

    Calling it with a row of metrics.jsonl writes the row, shows it in the trackers and writes its line on the terminal.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.is_root, self.world_size = rank == 0, world_size
        self.progress = Progress(total_steps=None, rank=rank)
        send_logs(lambda text: self.progress.note(text), lambda text: self.progress.warn(text))
        self.folder, self.is_new = Path(), False
        self._lock: int | None = None
        self.trackers: Trackers | None = None

    def drawing(self, rows_done: int, rows_total: int) -> None:
        """Show the progress of drawing the synthetic log."""
        if self.is_root and rows_done == rows_total:
            self.progress.note(f"drew the synthetic log: {short_number(rows_total)} rows")

    def open(self, config: RunConfig, schema: Schema, over_arch: OverArch, train: Course) -> Start:
        """Create the run folder, or find the one to go on with, and say what is about to run. Collective.

        Raises:
            UserError: see ``open_run_folder`` and ``find_start``.
        """
        opened: list[Any] = [None]
        values = config.model_dump(mode="json")
        if self.is_root:
            stem = f"{schema.name}-{config.over_arch.label}".lower().replace(" ", "_")
            try:
                check_trackers(config)
                opened = [open_run_folder(values, stem, config.over_arch.label)]
                self._lock = opened[0].lock
            except ValueError as error:
                opened = [error]
        dist.broadcast_object_list(opened)
        if isinstance(opened[0], ValueError):
            raise UserError(str(opened[0]))
        self.folder, goes_on, _ = opened[0]
        self.is_new = not goes_on
        start = find_start(values, self.folder, goes_on)
        steps = train.num_steps(config.train.epochs)
        steps = min(steps, config.train.max_steps or steps)
        first_step = start.info.get("step", 0)
        self.progress = Progress(total_steps=steps, first_step=first_step, rank=dist.get_rank())
        if self.is_root:
            write_text(self.folder / CONFIG_FILE, dump_config(config))
            self.trackers = Trackers(config, self.folder, first_step)
            self._introduce(config, schema, over_arch, train)
        if start.checkpoint is not None:
            ranks = start.info["world_size"]
            self.progress.note(f"resumed from {start.checkpoint}, step {first_step}, written by {ranks} rank(s)")
        elif goes_on:
            self.progress.note(f"{self.folder} has no checkpoint yet: from the beginning")
        return start

    def close(self) -> None:
        """Let other processes write the run folder, and loggers speak for themselves."""
        if self.trackers is not None:
            error = sys.exc_info()[0]
            stopped = error is not None and issubclass(error, (Preempted, KeyboardInterrupt))
            self.trackers.close("stopped" if stopped else "failed")
        self.progress.close()
        send_logs(None)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the run folder of a run that could not begin; one that was there before stays."""
        if self.is_root and self.is_new:
            if self.trackers is not None:
                self.trackers.close("failed")
            shutil.rmtree(self.folder)

    def _introduce(self, config: RunConfig, schema: Schema, over_arch: OverArch, train: Course) -> None:
        table_parameters = short_number(num_embedding_parameters(config, schema, over_arch))
        encoders = "".join(f" on {name} by {one.encoder.label}" for name, one in config.sequences.items())
        self.progress.note(
            f"{config.over_arch.label}{encoders}: {short_number(over_arch.num_parameters)} parameters, "
            f"{short_number(over_arch.flops_per_sample)}FLOPs a sample, {len(over_arch.field_dims)} fields\n"
            f"{schema.name}: {short_number(train.num_rows)} rows, tables of "
            f"{table_parameters} parameters on {self.world_size} rank(s), trained by {config.embeddings.optimizer}\n"
            f"run folder {self.folder}"
        )
        if (cut := train.share_cut()) is not None:
            self.progress.note(
                f"groups of {schema.together} are together; about {cut:.1%} are cut by the ends of batches and lanes"
            )

    def __call__(self, row: dict[str, Any]) -> None:
        if not self.is_root:
            return
        append_jsonl(self.folder / "metrics.jsonl", row)
        assert self.trackers is not None
        self.trackers.metrics(row)
        if row["split"] == "train":
            self.progress.show(row)
        else:
            tasks = row["tasks"].items()
            mains = {task: main_measure(values) for task, values in tasks}
            figures = "  ".join(f"{task} {_figures(mains[task], values)}" for task, values in tasks)
            what = f"next day {row['day']}" if "day" in row else row["split"]
            loss = "logloss" if {*mains.values()} == {"auc"} else "loss"
            self.progress.note(f"{what} at step {row['step']}: {loss} {decimal(row['loss'])}  {figures}", row)


def _figures(main: str, measures: Mapping[str, float]) -> str:
    """Return the main measure of a task and those of its rankings."""
    names = [main, *filter(is_ranking, measures)]
    return " ".join(f"{title(name)} {decimal(measures.get(name))}" for name in names)


def num_embedding_parameters(config: RunConfig, schema: Schema, over_arch: OverArch) -> int:
    reading = reading_of(schema, config.sequences)
    tables = table_dims(schema, config.embeddings, over_arch.extra_tables, reading)
    return sum(config.embeddings.rows_of(feature) * columns for feature, columns in tables.values())
