"""fit() and evaluate(): when to step, log, evaluate, keep the best and stop. Everything else is handed in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ssr_rec.data.reader import Prefetcher, Reader
from ssr_rec.metrics import RunningAUC, evaluate_predictions, gather_predictions
from ssr_rec.optim import Schedule
from ssr_rec.settings import Settings

Tasks = dict[str, dict[str, float]]
PROGRESS_ROWS = 16_384
"""Rows behind the AUC of a progress row: an indication, cheap to sort; evaluations are exact."""


class TrainConfig(Settings):
    batch_size: int = Field(1024, ge=1, description="rows of a global batch, over all ranks")
    eval_batch_size: int = Field(8192, ge=1, description="rows of a global batch in evaluation")
    epochs: int = Field(1, ge=1, description="at most this many passes over the training split")
    max_steps: int | None = Field(None, ge=1, description="at most this many steps; None: epochs alone decide")
    eval_every: int | None = Field(500, ge=1, description="steps between evaluations; None: one after each epoch")
    monitor: Literal["auc", "gauc", "logloss", "ne"] = Field("auc", description="validation metric that picks the best")
    monitor_task: str | None = Field(None, description="label whose metric counts; None: mean over the labels")
    patience: int | None = Field(None, ge=1, description="evaluations without a better one before stopping")
    task_weights: dict[str, float] = Field({}, description="label -> weight of its loss; 1 for those not named")
    bf16: bool = Field(False, description="over-arch and heads in bfloat16 by autocast; tables stay float32")
    log_every: int = Field(50, ge=1, description="steps between progress rows")


@dataclass
class Fitted:
    """What fit() did.

    Attributes:
        seconds: spent training, without evaluations and saving.
        data_wait: share of those seconds spent waiting for the reader.
        best: the validation row that won: its step, epoch and tasks.
    """

    steps: int = 0
    epochs: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    bad_evaluations: int = 0
    stopped_early: bool = False

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0


def run_steps(pipeline: TrainPipelineSparseDist, batches: Iterator[Any]) -> Iterator[Any]:
    """The outputs of the pipeline until ``batches`` ends; the pipeline is empty afterwards."""
    while True:
        try:
            output = pipeline.progress(batches)
        except StopIteration:
            return
        yield output


def evaluate(pipeline: TrainPipelineSparseDist, model: nn.Module, reader: Reader) -> dict[str, Any]:
    """Exact metrics of a split, the same on every rank and for every world size. Collective.

    Returns:
        ``loss`` (mean over labels of logloss, nats per row) and ``tasks`` (label -> metric -> value).
    """
    logits, labels, groups = [], [], []
    model.eval()
    batches = reader.epoch(0)
    with torch.no_grad():
        for _, batch_logits, batch_labels, batch_groups in run_steps(pipeline, batches):
            logits.append(batch_logits)
            labels.append(batch_labels)
            groups.append(batch_groups)
    batches.close()
    model.train()
    grouped = torch.cat(groups) if groups[0] is not None else None
    gathered = gather_predictions(torch.cat(logits), torch.cat(labels), grouped)
    found: list[Any] = [None]
    if gathered is not None:
        tasks = evaluate_predictions(*gathered, reader.schema.labels)
        found = [{"loss": sum(task["logloss"] for task in tasks.values()) / len(tasks), "tasks": tasks}]
    dist.broadcast_object_list(found)
    return found[0]


def monitored(tasks: Tasks, config: TrainConfig) -> float:
    """The figure early stopping watches, larger is better."""
    values = [metrics[config.monitor] for name, metrics in tasks.items() if config.monitor_task in (None, name)]
    value = sum(values) / len(values)
    if math.isnan(value):  # a fold of one class: any figure is better
        return -math.inf
    return value if config.monitor in ("auc", "gauc") else -value


@dataclass
class Loop:
    """What a run consists of, built by train.py, and what it has done so far.

    Attributes:
        log: receives every row of metrics.jsonl (train and validation), on every rank.
        save_best: called on every rank whenever the validation metric is the best so far.
    """

    pipeline: TrainPipelineSparseDist
    model: nn.Module
    schedule: Schedule
    train: Reader
    validation: Reader
    config: TrainConfig
    log: Callable[[dict[str, Any]], None]
    save_best: Callable[[], None]
    fitted: Fitted = field(default_factory=Fitted)

    def row(self, split: str, epoch: int, **figures: Any) -> dict[str, Any]:
        done = self.fitted
        where = {"step": done.steps, "epoch": epoch, "samples": done.samples, "seconds": done.seconds}
        return {**where, "split": split, **figures}


def fit(loop: Loop) -> Fitted:
    """Train until epochs, steps or patience run out. Collective.

    Raises:
        ValueError: the loss is not finite.
    """
    config, fitted = loop.config, loop.fitted
    steps_per_epoch = loop.train.steps_per_epoch
    total_steps = min(config.max_steps or math.inf, config.epochs * steps_per_epoch)
    running = RunningAUC(loop.train.schema.labels, window=PROGRESS_ROWS)
    loop.model.train()
    while fitted.steps < total_steps and not fitted.stopped_early:
        epoch, step_in_epoch = divmod(fitted.steps, steps_per_epoch)
        if step_in_epoch == 0:
            batches = loop.train.epoch(epoch)
        until = [total_steps, (epoch + 1) * steps_per_epoch]
        if config.eval_every is not None:
            until.append((fitted.steps // config.eval_every + 1) * config.eval_every)
        train_segment(loop, batches, epoch, int(min(until)), running)
        fitted.epochs = fitted.steps / steps_per_epoch
        if config.eval_every is None or fitted.steps % config.eval_every == 0 or fitted.steps == total_steps:
            _validate(loop, epoch)
    batches.close()
    return fitted


def _validate(loop: Loop, epoch: int) -> None:
    """Evaluate, keep the model if it is the best so far, and say whether patience has run out."""
    config, fitted = loop.config, loop.fitted
    row = loop.row("validation", epoch, **evaluate(loop.pipeline, loop.model, loop.validation))
    loop.log(row)
    if not fitted.best or monitored(row["tasks"], config) > monitored(fitted.best["tasks"], config):
        fitted.best, fitted.bad_evaluations = row, 0
        loop.save_best()
    else:
        fitted.bad_evaluations += 1
    fitted.stopped_early = config.patience is not None and fitted.bad_evaluations >= config.patience


def train_segment(loop: Loop, batches: Prefetcher, epoch: int, until: int, running: RunningAUC) -> None:
    """Train up to step ``until`` and empty the pipeline, so that evaluation and position are exact."""
    fitted, config, train = loop.fitted, loop.config, loop.train
    loop.schedule.set(fitted.steps)
    window, samples, clock, waited = [], 0, time.perf_counter(), batches.wait_seconds
    for loss, logits, labels, _ in run_steps(loop.pipeline, islice(batches, until - fitted.steps)):
        window.append(loss)
        running.update(logits, labels)
        samples += train.rows_in_step(fitted.steps % train.steps_per_epoch)
        fitted.steps += 1
        loop.schedule.set(fitted.steps)
        if fitted.steps % config.log_every and fitted.steps < until:
            continue
        losses = torch.stack(window)
        dist.all_reduce(losses)
        seconds, wait_seconds = time.perf_counter() - clock, batches.wait_seconds - waited
        fitted.samples += samples
        fitted.seconds += seconds
        fitted.wait_seconds += wait_seconds
        row = loop.row(
            "train",
            epoch,
            loss=losses.double().mean().item(),
            samples_per_s=samples / seconds,
            data_wait=wait_seconds / seconds,
            lr=loop.schedule.base[-1] * loop.schedule.factor(fitted.steps - 1),
            tasks={label: {"auc": value} for label, value in running.compute().items()},
        )
        loop.log(row)
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"loss is {row['loss']} in the {len(window)} steps up to {fitted.steps}: lower "
                "optimizer.learning_rate or embeddings.learning_rate, or set optimizer.clip_norm"
            )
        window, samples, clock, waited = [], 0, time.perf_counter(), batches.wait_seconds
