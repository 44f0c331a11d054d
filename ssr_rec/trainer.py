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
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ssr_rec.data.reader import Prefetcher, Reader
from ssr_rec.metrics import RunningAUC, evaluate_predictions, gather_predictions
from ssr_rec.optim import Schedule
from ssr_rec.settings import Settings

Tasks = dict[str, dict[str, float]]


class TrainConfig(Settings):
    batch_size: int = Field(1024, ge=1, description="rows of a global batch, over all ranks")
    eval_batch_size: int = Field(8192, ge=1, description="rows of a global batch in evaluation")
    epochs: int = Field(1, ge=1, description="at most this many passes over the training split")
    max_steps: int | None = Field(None, ge=1, description="at most this many steps; None: epochs alone decide")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; None: one after each epoch")
    monitor: Literal["auc", "gauc", "logloss", "ne"] = Field(
        "auc", description="validation metric that picks the best"
    )
    monitor_task: str | None = Field(None, description="label whose metric counts; None: mean over the labels")
    patience: int | None = Field(
        None, ge=1, description="evaluations without a better one before stopping"
    )
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
    return value if config.monitor in ("auc", "gauc") else -value


class Window:
    """Sums over the steps since the last progress row."""

    def __init__(self, fitted: Fitted) -> None:
        self.losses: list[Tensor] = []
        self.samples, self.seconds, self.wait_seconds = fitted.samples, fitted.seconds, fitted.wait_seconds

    def row(self, fitted: Fitted) -> dict[str, Any]:
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        seconds = max(fitted.seconds - self.seconds, 1e-9)
        return {
            "loss": losses.double().mean().item(),
            "samples_per_s": (fitted.samples - self.samples) / seconds,
            "data_wait": (fitted.wait_seconds - self.wait_seconds) / seconds,
        }


def fit(
    pipeline: TrainPipelineSparseDist,
    model: nn.Module,
    schedule: Schedule,
    train: Reader,
    validation: Reader,
    config: TrainConfig,
    log: Callable[[dict[str, Any]], None],
    save_best: Callable[[], None],
) -> Fitted:
    """Train until epochs, steps or patience run out. Collective.

    Args:
        log: receives every row of metrics.jsonl (train and validation), on every rank.
        save_best: called on every rank whenever the validation metric is the best so far.

    Raises:
        ValueError: the loss is not finite.
    """
    fitted = Fitted()
    total_steps = min(config.max_steps or math.inf, config.epochs * train.steps_per_epoch)
    running = RunningAUC(train.schema.labels)
    bad_evaluations = 0
    model.train()
    for epoch in range(config.epochs):
        batches = train.epoch(epoch)
        step_in_epoch = 0
        while step_in_epoch < train.steps_per_epoch and fitted.steps < total_steps:
            segment = train.steps_per_epoch - step_in_epoch
            if config.eval_every is not None:
                segment = min(segment, config.eval_every - fitted.steps % config.eval_every)
            segment = int(min(segment, total_steps - fitted.steps))
            _train_segment(pipeline, schedule, batches, segment, fitted, train, epoch, running, config, log)
            step_in_epoch += segment
            if config.eval_every and fitted.steps % config.eval_every and fitted.steps < total_steps:
                continue
            row: dict[str, Any] = dict(step=fitted.steps, epoch=epoch, samples=fitted.samples, seconds=fitted.seconds)
            row |= {"split": "validation", **evaluate(pipeline, model, validation)}
            log(row)
            if not fitted.best or monitored(row["tasks"], config) > monitored(fitted.best["tasks"], config):
                fitted.best, bad_evaluations = row, 0
                save_best()
            else:
                bad_evaluations += 1
            if config.patience is not None and bad_evaluations >= config.patience:
                fitted.stopped_early = True
                break
        batches.close()
        fitted.epochs = epoch + step_in_epoch / train.steps_per_epoch
        if fitted.stopped_early or fitted.steps >= total_steps:
            break
    return fitted


def _train_segment(
    pipeline: TrainPipelineSparseDist,
    schedule: Schedule,
    batches: Prefetcher,
    num_steps: int,
    fitted: Fitted,
    train: Reader,
    epoch: int,
    running: RunningAUC,
    config: TrainConfig,
    log: Callable[[dict[str, Any]], None],
) -> None:
    window = Window(fitted)
    schedule.set(fitted.steps)
    clock, waited = time.perf_counter(), batches.wait_seconds
    last_step = fitted.steps + num_steps
    for loss, logits, labels, _ in run_steps(pipeline, islice(batches, num_steps)):
        window.losses.append(loss)
        running.update(logits, labels)
        fitted.samples += train.rows_in_step(fitted.steps % train.steps_per_epoch)
        fitted.steps += 1
        schedule.set(fitted.steps)
        if fitted.steps % config.log_every and fitted.steps < last_step:
            continue
        now = time.perf_counter()
        fitted.seconds += now - clock
        fitted.wait_seconds += batches.wait_seconds - waited
        clock, waited = now, batches.wait_seconds
        row: dict[str, Any] = dict(step=fitted.steps, epoch=epoch, samples=fitted.samples, seconds=fitted.seconds)
        row |= {"split": "train", **window.row(fitted), "lr": schedule.base[-1] * schedule.factor(fitted.steps - 1)}
        row["tasks"] = {label: {"auc": value} for label, value in running.compute().items()}
        log(row)
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"loss is {row['loss']} in the {len(window.losses)} steps up to {fitted.steps}: lower "
                "optimizer.learning_rate or embeddings.learning_rate, or set optimizer.clip_norm"
            )
        window = Window(fitted)
