"""fit() and evaluate(): when to step, log, evaluate, keep the best and stop. Everything else is handed in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ssr_rec.data.course import Course
from ssr_rec.data.reader import Prefetcher, Reader
from ssr_rec.evaluation import evaluate, run_steps
from ssr_rec.metrics import RunningAUC
from ssr_rec.model import average_running_statistics
from ssr_rec.optim import Schedule
from ssr_rec.saver import Contents, Saver
from ssr_rec.settings import Settings
from ssr_rec.skipping import note_bad_steps
from ssr_rec.watch import Preempted

Tasks = dict[str, dict[str, float]]
Validation = Callable[[int], tuple[Reader, dict[str, Any]] | None]
"""What to evaluate after an epoch (-1: before the first), and what the row says of it; None: nothing."""
PROGRESS_ROWS = 16_384
"""Rows behind the AUC of a progress row: an indication, cheap to sort; evaluations are exact."""


class TrainConfig(Settings):
    batch_size: int = Field(1024, ge=1, description="rows of a global batch, over all ranks")
    eval_batch_size: int = Field(8192, ge=1, description="rows of a global batch in evaluation")
    epochs: int = Field(1, ge=1, description="at most this many passes over the training split")
    max_steps: int | None = Field(None, ge=1, description="at most this many steps; None: epochs alone decide")
    eval_every: int | None = Field(500, ge=1, description="steps between evaluations; None: one after each epoch")
    metrics: Literal["auto", "exact", "bounded"] = Field(
        "auto", description="exact keeps every prediction; bounded does not grow, with error bounds; auto: by the rows"
    )
    metrics_rows: int = Field(
        2**22, ge=1, description="rows of a fold up to which auto is exact, and that bounded keeps for GAUC"
    )
    monitor: Literal["auc", "gauc", "logloss", "ne"] = Field("auc", description="validation metric that picks the best")
    monitor_task: str | None = Field(None, description="label whose metric counts; None: mean over the labels")
    patience: int | None = Field(None, ge=1, description="evaluations without a better one before stopping")
    task_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="label -> weight of its loss; 1 for those not named; 0: evaluated, not trained"
    )
    pipeline: Literal["sparse_dist", "prefetch"] = Field(
        "sparse_dist", description="prefetch: also fetch cached rows of fused_uvm_caching tables ahead; CUDA only"
    )
    accumulate: int = Field(
        1, ge=1, description="batches for one update of the over-arch and heads; every batch updates the tables"
    )
    tf32: bool = Field(False, description="matrix products of the over-arch in TF32, on GPUs from A100 on")
    bf16: bool = Field(False, description="over-arch and heads in bfloat16 by autocast; tables stay float32")
    log_every: int = Field(50, ge=1, description="steps between progress rows")
    max_loss: float | None = Field(10.0, gt=0, description="nats per row above which training has exploded; None: any")
    skip_bad_steps: int = Field(
        0, ge=0, description="leave out up to so many steps whose loss is not finite or above max_loss; 0: stop at one"
    )
    stall_timeout_s: float | None = Field(
        900.0, gt=0, description="seconds without progress after which a stalled rank ends the job; None: wait"
    )


@dataclass
class Fitted:
    """What fit() did.

    Attributes:
        seconds: spent training, without evaluations and saving.
        data_wait: share of those seconds spent waiting for the reader.
        best: the validation row that won: its step, epoch and tasks.
        evaluated_at: step of the last evaluation.
        skipped: steps left out for their loss.
        steps_before: those of earlier runs whose optimizer state this one began with.
        days: the validation rows of a training by days.
    """

    steps: int = 0
    epochs: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    bad_evaluations: int = 0
    stopped_early: bool = False
    evaluated_at: int = 0
    skipped: int = 0
    steps_before: int = 0
    days: list[dict[str, Any]] = field(default_factory=list)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0


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
        running: AUC over the last training rows, for progress rows.
        log: receives every row of metrics.jsonl (train and validation), on every rank.
        note: receives lines for people, on every rank.
        weights, state: what ``saver`` writes as the best and as a training checkpoint.
        beat: told where this rank is, for the watch over stalled ranks.
        asked_to_stop: whether this process has been asked to (SIGTERM).
        around: makes the context of a batch from its rows and whether the dense part is updated after it.
    """

    pipeline: TrainPipelineSparseDist
    model: nn.Module
    schedule: Schedule
    train: Course
    validation: Validation
    config: TrainConfig
    running: RunningAUC
    log: Callable[[dict[str, Any]], None]
    note: Callable[[str], None]
    saver: Saver
    weights: Callable[[], Contents]
    state: Callable[[], Contents]
    beat: Callable[[str], None]
    asked_to_stop: Callable[[], bool] = bool
    around: Callable[[int, bool], AbstractContextManager[None]] = lambda rows, ends_group: nullcontext()
    fitted: Fitted = field(default_factory=Fitted)

    @property
    def total_steps(self) -> int:
        config = self.config
        return int(min(config.max_steps or math.inf, self.train.num_steps(config.epochs)))

    def updates_dense_at(self, step: int) -> bool:
        """Whether the over-arch is updated with this step (from 1): the last of ``accumulate``, or of the run."""
        return step % self.config.accumulate == 0 or step == self.total_steps

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether what is done every so many steps is due after this one: with an update of the over-arch."""
        group = self.config.accumulate
        return every is not None and step % group == 0 and step // every > (step - group) // every

    def row(self, split: str, epoch: int, **figures: Any) -> dict[str, Any]:
        done = self.fitted
        where = {"step": done.steps, "epoch": epoch, "samples": done.samples, "seconds": done.seconds}
        return {**where, "split": split, **figures}


def fit(loop: Loop) -> Fitted:
    """Train until epochs, steps or patience run out. Collective.

    Raises:
        ValueError: the loss is not finite or explodes.
        Preempted: asked to stop; the checkpoint is written.
    """
    config, fitted, saver = loop.config, loop.fitted, loop.saver
    total_steps = loop.total_steps
    batches: Prefetcher | None = None
    loop.model.train()
    try:
        if _evaluation_is_due(loop, total_steps):  # the checkpoint was written between a step and its evaluation
            _validate(loop)
        while fitted.steps < total_steps and not fitted.stopped_early:
            epoch, step_in_epoch = loop.train.locate(fitted.steps)
            if batches is None or step_in_epoch == 0:
                batches = loop.train.epoch(epoch, step_in_epoch)
            until = [total_steps, loop.train.end_of(epoch)]
            if config.eval_every is not None:
                until.append((fitted.steps // config.eval_every + 1) * config.eval_every)
            checkpoint_is_due = train_segment(loop, batches, epoch, min(until))
            if _evaluation_is_due(loop, total_steps):
                _validate(loop)
            if checkpoint_is_due:
                saver.save_training(loop.state())
    finally:
        if batches is not None:
            batches.close()
    if saver.config.is_on and saver.last_step < fitted.steps:
        saver.save_training(loop.state())
    return fitted


def _evaluation_is_due(loop: Loop, total_steps: int) -> bool:
    fitted, every = loop.fitted, loop.config.eval_every
    ends = loop.train.locate(fitted.steps)[1] == 0 if every is None else fitted.steps % every == 0
    return fitted.evaluated_at < fitted.steps and (ends or fitted.steps == total_steps)


def _validate(loop: Loop) -> None:
    """Evaluate, keep the model if it is the best so far, and say whether patience has run out."""
    config, fitted = loop.config, loop.fitted
    epoch = loop.train.locate(fitted.steps - 1)[0] if fitted.steps else -1
    fitted.evaluated_at = fitted.steps
    if (chosen := loop.validation(epoch)) is None:
        return
    reader, said = chosen
    average_running_statistics(loop.model)
    row = loop.row("validation", epoch, **said, **evaluate(loop.pipeline, loop.model, reader, config, loop.beat))
    loop.log(row)
    if "day" in said:
        fitted.days.append(row)
    if not fitted.best and monitored(row["tasks"], config) == -math.inf:
        without = [name for name, metrics in row["tasks"].items() if math.isnan(metrics[config.monitor])]
        loop.note(
            f"the validation fold gives no {config.monitor} for {', '.join(without)} (rows of one class?), so that its "
            "evaluations cannot choose the best model; name another label by train.monitor_task, or monitor logloss"
        )
    if not fitted.best or monitored(row["tasks"], config) > monitored(fitted.best["tasks"], config):
        fitted.best, fitted.bad_evaluations = row, 0
        loop.saver.save_best(loop.weights())
    else:
        fitted.bad_evaluations += 1
    fitted.stopped_early = config.patience is not None and fitted.bad_evaluations >= config.patience


def train_segment(loop: Loop, batches: Prefetcher, epoch: int, until: int) -> bool:
    """Train up to step ``until`` and empty the pipeline, so that evaluation and position are exact.

    Checkpoints on the way need no empty pipeline: a batch in flight has not touched a weight. They are written only
    where the over-arch has just been updated, so that none holds a half of accumulated gradients.

    Returns:
        whether a checkpoint is due after the last step.
    """
    fitted, config, train = loop.fitted, loop.config, loop.train
    loop.schedule.set(fitted.steps)
    window = _Window(fitted.steps, batches)

    def around() -> AbstractContextManager[None]:
        # Also once more after the last step, to find that there are no further batches.
        rows = train.rows_in_step(fitted.steps) if fitted.steps < until else 0
        return loop.around(rows, loop.updates_dense_at(fitted.steps + 1))

    for loss, logits, labels, _ in run_steps(loop.pipeline, islice(batches, until - fitted.steps), around):
        window.losses.append(loss)
        loop.running.update(logits, labels)
        window.samples += train.rows_in_step(fitted.steps)
        fitted.steps += 1
        loop.schedule.set(fitted.steps)
        loop.beat(f"step {fitted.steps}")
        is_due = loop.is_due(loop.saver.config.every_steps, fitted.steps)
        if not loop.is_due(config.log_every, fitted.steps) and fitted.steps < until and not is_due:
            continue
        stop, is_time = _close_window(loop, window, epoch)
        window = _Window(fitted.steps, batches)
        if stop:
            loop.saver.save_training(loop.state())
            loop.saver.finish()
            raise Preempted(f"asked to stop at step {fitted.steps}")
        if (is_due or is_time) and fitted.steps < until:
            loop.saver.save_training(loop.state())
    return is_due or is_time


class _Window:
    """The steps of one progress row."""

    def __init__(self, first_step: int, batches: Prefetcher) -> None:
        self.first_step, self.batches = first_step, batches
        self.losses: list[torch.Tensor] = []
        self.samples = 0
        self.clock, self.waited = time.perf_counter(), batches.wait_seconds


def _close_window(loop: Loop, window: _Window, epoch: int) -> tuple[bool, bool]:
    """Log the steps of a window and look at their losses.

    Returns:
        whether any rank was asked to stop, and whether rank 0's clock wants a checkpoint.
    """
    fitted, config = loop.fitted, loop.config
    asked = [float(loop.asked_to_stop()), float(loop.saver.is_time() and dist.get_rank() == 0)]
    if not loop.updates_dense_at(fitted.steps):
        asked = [0.0, 0.0]  # the next window asks again
    sums = torch.cat([torch.stack(window.losses), window.losses[0].new_tensor(asked)])
    dist.all_reduce(sums)
    losses, (stop, is_time) = sums[:-2].double().cpu(), sums[-2:].tolist()
    seconds, wait_seconds = time.perf_counter() - window.clock, window.batches.wait_seconds - window.waited
    fitted.samples += window.samples
    fitted.seconds += seconds
    fitted.wait_seconds += wait_seconds
    fitted.epochs = loop.train.epochs_done(fitted.steps)
    good = losses.isfinite() & (losses <= (config.max_loss or math.inf))
    trained = losses[good] if config.skip_bad_steps and good.any() else losses
    row = loop.row(
        "train",
        epoch,
        loss=trained.mean().item(),
        samples_per_s=window.samples / seconds,
        data_wait=wait_seconds / seconds,
        lr=loop.schedule.base[-1] * loop.schedule.factor(fitted.steps - 1),
        tasks={label: {"auc": value} for label, value in loop.running.compute().items()},
    )
    loop.log(row)
    if not good.all():
        fitted.skipped += int((~good).sum())
        note_bad_steps(loop.train, window.first_step, losses, good, fitted.skipped, config.skip_bad_steps, loop.note)
    return bool(stop), bool(is_time)
