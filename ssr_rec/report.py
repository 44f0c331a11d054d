"""What a run leaves behind: its log rows as they come, and the report at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from ssr_rec.config import RunConfig, dump_config
from ssr_rec.data.course import Course
from ssr_rec.day_figures import days_table, draw_days
from ssr_rec.embeddings import table_dims
from ssr_rec.figures import draw_curves
from ssr_rec.model import DenseArch
from ssr_rec.over_archs import OverArch
from ssr_rec.progress import Progress, decimal, short_number
from ssr_rec.resume import Start, find_start, open_run_folder
from ssr_rec.run_folder import (
    CONFIG_FILE,
    Run,
    append_jsonl,
    git_commit,
    hardware,
    open_tensorboard,
    read_metrics,
    versions,
    write_json,
    write_scalars,
    write_text,
)
from ssr_rec.schema import Schema
from ssr_rec.trainer import Fitted, Tasks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The run folder (contract 5 of docs/architecture.md) while the run is on: rank 0 writes, the others agree.

    Calling it with a row of metrics.jsonl writes the row, its TensorBoard scalars and its line on the terminal.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.is_root, self.world_size = rank == 0, world_size
        self.progress = Progress(total_steps=None, rank=rank)
        self.folder, self.is_new = Path(), False
        self.tensorboard: SummaryWriter | None = None

    def drawing(self, rows_done: int, rows_total: int) -> None:
        """Progress of drawing the synthetic log."""
        if self.is_root and rows_done == rows_total:
            self.progress.note(f"drew the synthetic log: {short_number(rows_total)} rows")

    def open(self, config: RunConfig, schema: Schema, over_arch: OverArch, train: Course) -> Start:
        """Create the run folder, or find the one to go on with, and say what is about to run. Collective.

        Raises:
            ValueError: see ``open_run_folder`` and ``find_start``.
        """
        opened: list[Any] = [None]
        values = config.model_dump(mode="json")
        if self.is_root:
            stem = f"{schema.name}-{config.over_arch.label}".lower().replace(" ", "_")
            try:
                opened = [open_run_folder(values, stem, config.over_arch.label)]
            except ValueError as error:
                opened = [error]
        dist.broadcast_object_list(opened)
        if isinstance(opened[0], ValueError):
            raise ValueError(str(opened[0]))
        self.folder, goes_on = opened[0]
        self.is_new = not goes_on
        start = find_start(values, self.folder, goes_on, self.progress.note)
        steps = train.num_steps(config.train.epochs)
        steps = min(steps, config.train.max_steps or steps)
        first_step = start.info.get("step", 0)
        self.progress = Progress(total_steps=steps, first_step=first_step, rank=dist.get_rank())
        if self.is_root:
            write_text(self.folder / CONFIG_FILE, dump_config(config))
            self.tensorboard = open_tensorboard(self.folder, first_step)
            self._introduce(config, schema, over_arch, train)
        if start.checkpoint is not None:
            ranks = start.info["world_size"]
            self.progress.note(f"resumed from {start.checkpoint}, step {first_step}, written by {ranks} rank(s)")
        elif goes_on:
            self.progress.note(f"{self.folder} has no checkpoint yet: from the beginning")
        return start

    def discard(self) -> None:
        """Remove the run folder of a run that could not begin; one that was there before stays."""
        if self.is_root and self.is_new:
            if self.tensorboard is not None:
                self.tensorboard.close()
            shutil.rmtree(self.folder)

    def _introduce(self, config: RunConfig, schema: Schema, over_arch: OverArch, train: Course) -> None:
        table_parameters = short_number(num_embedding_parameters(config, schema, over_arch))
        self.progress.note(
            f"{config.over_arch.label}: {short_number(over_arch.num_parameters)} parameters, "
            f"{short_number(over_arch.flops_per_sample)}FLOPs a sample, {len(schema.features)} fields\n"
            f"{schema.name}: {short_number(train.num_rows)} rows, tables of "
            f"{table_parameters} parameters on {self.world_size} rank(s)\n"
            f"run folder {self.folder}"
        )

    def __call__(self, row: dict[str, Any]) -> None:
        if not self.is_root:
            return
        append_jsonl(self.folder / "metrics.jsonl", row)
        assert self.tensorboard is not None
        write_scalars(self.tensorboard, row)
        if row["split"] == "train":
            self.progress.show(row)
        else:
            figures = "  ".join(f"{task} AUC {decimal(values['auc'])}" for task, values in row["tasks"].items())
            what = f"next day {row['day']}" if "day" in row else row["split"]
            self.progress.note(f"{what} at step {row['step']}: logloss {decimal(row['loss'])}  {figures}")


def num_embedding_parameters(config: RunConfig, schema: Schema, over_arch: OverArch) -> int:
    tables = table_dims(schema, config.embeddings, over_arch.extra_tables)
    return sum(config.embeddings.rows_of(feature) * columns for feature, columns in tables.values())


@contextmanager
def capture_inputs(over_arch: OverArch, rows: int = 1024) -> Iterator[list[Tensor]]:
    """Keep up to ``rows`` rows of the first batch that reaches ``over_arch`` inside the block."""
    kept: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
        if not kept:
            kept.append(inputs[0][:rows].detach().clone())

    handle = over_arch.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def build_report(
    config: RunConfig, train: Course, dense: DenseArch, fitted: Fitted, test: Tasks, x: Tensor, world_size: int
) -> dict[str, Any]:
    """The figures of report.json; ``x`` (b, F*D) is a batch for the over-arch's statistics."""
    over_arch, schema = dense.over_arch, train.schema
    return {
        "name": None,
        "over_arch": {
            "name": config.over_arch.name,
            "kind": config.over_arch.label,
            "num_parameters": over_arch.num_parameters,
            "flops_per_sample": over_arch.flops_per_sample,
            **over_arch.statistics(x, schema.feature_names),
        },
        "num_head_parameters": sum(p.numel() for p in dense.heads.parameters()),
        "num_embedding_parameters": num_embedding_parameters(config, schema, over_arch),
        "test": test,
        "validation": fitted.best["tasks"],
        "best_step": fitted.best["step"],
        "ceiling": {task: c.model_dump() for task, c in schema.ceiling.get("test", {}).items() if task in test},
        "samples_per_s": fitted.samples_per_s,
        "data_wait": fitted.data_wait,
        "world_size": world_size,
        "steps": fitted.steps,
        "epochs": fitted.epochs,
        "stopped_early": fitted.stopped_early,
        "skipped_steps": fitted.skipped,
        "seconds": fitted.seconds,
        "seed": config.seed,
        "dataset": {
            "name": schema.name,
            "dataset_id": schema.dataset_id,
            "num_rows": train.num_rows,
        },
        "versions": versions(),
        "git_commit": git_commit(),
        "hardware": hardware(),
    }


def finish_report(log: RunLog, report: dict[str, Any]) -> None:
    """Write report.json and curves.png and print the result, on rank 0."""
    if not log.is_root:
        return
    report["name"] = log.folder.name
    write_json(log.folder / "report.json", report)
    draw_curves(read_metrics(log.folder / "metrics.jsonl"), report, log.folder / "curves.png")
    pictures = [str(log.folder / "curves.png")]
    what = "test"
    if "days" in report:
        draw_days([Run(report, [])], log.folder / "days.png")
        pictures.append(str(log.folder / "days.png"))
        what = f"mean of {len(report['days'])} next days,"
    if log.tensorboard is not None:
        log.tensorboard.close()
    log.progress.close()
    if "days" in report:
        print(days_table([Run(report, [])]))
    for task, values in report["test"].items():
        print(f"{report['over_arch']['kind']}  {what} {task}: {_figures(values, report['ceiling'].get(task))}")
    if "interactions" in report["over_arch"]:
        print(_interactions(report["over_arch"]["interactions"]))
    print(f"report {log.folder / 'report.json'}, pictures {', '.join(pictures)}", flush=True)


def _interactions(found: Mapping[str, Any], most: int = 8) -> str:
    """Which pairs of fields an AutoFIS search left, or how it weighs them in the end, the strongest first."""
    open_gates = sorted((row for row in found["alphas"] if row[2]), key=lambda row: -abs(row[2]))
    strongest = ", ".join(f"{i} x {j} {decimal(alpha, 3)}" for i, j, alpha in open_gates[:most])
    return f"{found['stage']}: {len(open_gates)} of {found['pairs']} pairs of fields; strongest: {strongest or 'none'}"


def _figures(values: Mapping[str, float], ceiling: Mapping[str, float] | None) -> str:
    names = {"auc": "AUC", "gauc": "GAUC", "logloss": "logloss", "ne": "NE"}
    parts = [
        f"{label} {decimal(values[key])}{_plus_minus(values, key)}" for key, label in names.items() if key in values
    ]
    if ceiling:
        parts.append(f"(ceiling of the log: AUC {decimal(ceiling['auc'])}, logloss {decimal(ceiling['logloss'])})")
    return "  ".join(parts)


def _plus_minus(values: Mapping[str, float], key: str) -> str:
    """What a measure of a bounded evaluation may be off by."""
    bound = values.get(f"{key}_bound")
    return "" if bound is None else f" +-{bound:.1e}"
