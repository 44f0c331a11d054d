"""Trains one run: decides when to step, evaluate, keep the best, write a checkpoint and stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.checkpointing.manager import CheckpointManager, Contents
from ssr_rec.checkpointing.progress import Fitted
from ssr_rec.checkpointing.resume import Start, recover_best
from ssr_rec.checkpointing.train_state import restore, training_now, weights_now
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.checkpointing.warm_start import load_weights, warm_start
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig
from ssr_rec.data.reader import Prefetcher, Reader
from ssr_rec.metrics.running import RunningAUC
from ssr_rec.model.ctr_model import DenseArch, average_running_statistics
from ssr_rec.over_archs.base import OverArch
from ssr_rec.training.accumulation import Accumulation
from ssr_rec.training.adaptation import Adaptation
from ssr_rec.training.averaging import averaged_weights
from ssr_rec.training.bad_steps import is_good, note_bad_steps
from ssr_rec.training.captured import capture
from ssr_rec.training.datasets import Rows, report_of_days
from ssr_rec.training.evaluation import evaluate, run_steps
from ssr_rec.training.filter_watch import FilterWatch, per_layer
from ssr_rec.training.monitor import is_better, say_what_cannot_choose
from ssr_rec.training.pipeline import build_pipeline
from ssr_rec.training.schedule import Schedule
from ssr_rec.training.stall_watch import Preempted, StallWatch, stop_when_asked
from ssr_rec.training.window import Window

PROGRESS_ROWS = 16_384
"""Rows behind the AUC of a progress row: an indication, cheap to sort; evaluations are exact."""


class Trainer:
    """Trains a model, and has all that its checkpoints hold.

    ``fit`` yields rows of metrics.jsonl as they come. All methods are collective unless they say otherwise.

        trainer = Trainer(config, rows, model, optimizer, checkpoints)
        for row in trainer.fit():
            print(row)
        print(trainer.test()["test"])

    Attributes:
        fitted: what has been done so far.
        schedule: the learning rates.
        running: AUC over the last training rows, for progress rows.

    Args:
        rows: what to train on and to evaluate.
        checkpoints: writes them, or nothing if the config says so.
        watch: told where this rank is; None: nobody watches.
    """

    def __init__(
        self,
        config: RunConfig,
        rows: Rows,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        checkpoints: CheckpointManager,
        watch: StallWatch | None = None,
    ) -> None:
        self.run_config, self.config, self.rows, self.model = config, config.train, rows, model
        self.optimizer, self.checkpoints, self.watch = optimizer, checkpoints, watch
        self.dense: DenseArch = model.module.model.dense
        self.train, self.schema = rows.train, rows.train.schema
        self.fitted, self._values = Fitted(), config.model_dump(mode="json")
        self.schedule = Schedule(optimizer, config)
        self.running = RunningAUC(self.config.measured(self.schema.labels), PROGRESS_ROWS, self.schema.number_names)
        self.filter_watch = FilterWatch(self.over_arch.sparse_filters())
        self.adaptation = Adaptation(self.over_arch, optimizer, self.config.accumulate)
        self.accumulation = Accumulation(model, optimizer) if self.config.accumulate > 1 else None
        device = next(model.parameters()).device
        self.pipeline = build_pipeline(model, self.accumulation or optimizer, device, self.config)
        self._asked_to_stop: Callable[[], bool] = bool

    @property
    def over_arch(self) -> OverArch:
        return self.dense.over_arch

    @property
    def total_steps(self) -> int:
        config = self.config
        return int(min(config.max_steps or math.inf, self.train.num_steps(config.epochs)))

    def state_dict(self) -> Contents:
        """Return a training checkpoint: tensors, which are the run's own, and JSON values."""
        return training_now(self.model, self.optimizer, self.running, self.fitted, self.train, self._values)

    def load_state_dict(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Go on from a training checkpoint, written by any number of ranks.

        Raises:
            UserError: the checkpoint does not fit the model, or its position would mean other rows.
        """
        self.fitted = restore(folder, info, self.model, self.optimizer, self.running, self.train, self.run_config.seed)
        self.checkpoints.last_step = self.fitted.steps

    def start(self, start: Start, here: Here) -> dict[str, Any] | None:
        """Begin: with the state of a checkpoint, with another run's weights, or anew.

        Args:
            here: the dataset, of which a warm start needs the vocabularies.

        Returns:
            the report of a warm start, or None.

        Raises:
            UserError: what there is to begin with does not fit.
        """
        config, report = self.run_config, None
        if start.checkpoint is not None:
            self.load_state_dict(start.checkpoint, start.info)
            if self.fitted.best and recover_best(start, self.fitted.best["step"]):
                self.checkpoints.best_step = self.fitted.best["step"]
            else:
                self.fitted.forget_best()
        elif config.warm_start is not None:
            # What old weights make of the first day is seen before they are trained on it.
            self.fitted = Fitted(evaluated_at=-1 if config.data.days else 0)
            wanted = self.optimizer if config.warm_start_optimizer else None
            report = warm_start(self.model, Path(config.warm_start), here, wanted)
            self.fitted.steps_before = report["optimizer"]["steps"] if wanted is not None else 0
        self.schedule = Schedule(self.optimizer, config, self.fitted.steps_before)
        return report

    def fit(self) -> Iterator[dict[str, Any]]:
        """Train until epochs, steps or patience run out, and yield progress and validation rows.

        Raises:
            UserError: the loss is not finite or explodes, or a run that ended within a group of batches would go on.
            Preempted: asked to stop; the checkpoint is written.
        """
        with stop_when_asked() as self._asked_to_stop:
            try:
                yield from self._fit()
            finally:
                self.checkpoints.finish()  # one from before a bad step may still be being written

    def _fit(self) -> Iterator[dict[str, Any]]:
        config, fitted, checkpoints = self.config, self.fitted, self.checkpoints
        total_steps = self.total_steps
        if fitted.steps < total_steps and not fitted.stopped_early and fitted.steps % config.accumulate:
            raise UserError(
                f"resume: the run ended at step {fitted.steps}, within a group of train.accumulate={config.accumulate},"
                " and updated the over-arch for the part; more steps would not be those of a longer run. Begin a new "
                "run with --warm_start and --warm_start_optimizer=true"
            )
        batches: Prefetcher | None = None
        self.model.train()
        try:
            if self._evaluation_is_due(total_steps):  # the checkpoint was written between a step and its evaluation
                yield from self._validate()
            while fitted.steps < total_steps and not fitted.stopped_early:
                epoch, step_in_epoch = self.train.locate(fitted.steps)
                if batches is None or step_in_epoch == 0:
                    batches = self.train.epoch(epoch, step_in_epoch)
                until = [total_steps, self.train.end_of(epoch)]
                if config.eval_every is not None:
                    until.append((fitted.steps // config.eval_every + 1) * config.eval_every)
                checkpoint_is_due = yield from self.train_segment(batches, epoch, min(until))
                if self._evaluation_is_due(total_steps):
                    yield from self._validate()
                if checkpoint_is_due:
                    checkpoints.save_training(self.state_dict())
        finally:
            if batches is not None:
                batches.close()
        if checkpoints.config.is_on and checkpoints.last_step < fitted.steps:
            checkpoints.save_training(self.state_dict())

    def evaluate(self, reader: Reader, deciles: bool = False) -> dict[str, Any]:
        """See ``evaluation.evaluate``: of the weights as they are."""
        return evaluate(self.pipeline, self.model, reader, self.config, self._beat, deciles)

    def test(self, of_the_best: bool = True) -> dict[str, Any]:
        """Return what the run ends with: ``test`` (task -> measures), ``metrics`` and what ``capture`` saw.

        Of splits also ``deciles`` and the test ``row`` of metrics.jsonl, of days ``days``, whose mean the test is.

        Args:
            of_the_best: with the weights of the best evaluation, not those of the end.
        """
        self._beat("the test")
        rows, fitted = self.rows, self.fitted
        if rows.test is None:
            last = rows.open_split(fitted.days[-1]["day"], False)
            return {**report_of_days(fitted.days), **self._see_first_rows(last)}
        if of_the_best:
            load_weights(self.model, self.checkpoints.best_folder)
        with capture(self.dense) as captured, nullcontext() if of_the_best else averaged_weights(self.optimizer):
            found = self.evaluate(rows.test, deciles=True)
        ended = {"test": found["tasks"], "deciles": found.pop("deciles"), **found}
        as_of = {key: fitted.best[key] for key in ("step", "samples", "seconds")} if of_the_best else {}
        row = self.row("test", fitted.best["epoch"], **found) | as_of
        return {**ended, "row": row, **captured.found()}

    def _see_first_rows(self, reader: Reader) -> dict[str, Any]:
        """Return what ``Captured.found`` does of the first rows of a split."""
        batches = reader.epoch(0)
        self.model.eval()
        with capture(self.dense) as captured, torch.no_grad():
            for _ in run_steps(self.pipeline, islice(batches, 1)):
                pass
        batches.close()
        self.model.train()
        return captured.found()

    def row(self, split: str, epoch: int, **figures: Any) -> dict[str, Any]:
        """Return a row of metrics.jsonl of what has been done so far. Not collective."""
        done = self.fitted
        where = {"step": done.steps, "epoch": epoch, "samples": done.samples, "seconds": done.seconds, "split": split}
        return {**where, **figures}

    def _beat(self, where: str) -> None:
        if self.watch is not None:
            self.watch.beat(where)

    def _evaluation_is_due(self, total_steps: int) -> bool:
        fitted, every = self.fitted, self.config.eval_every
        ends = self.train.locate(fitted.steps)[1] == 0 if every is None else fitted.steps % every == 0
        return fitted.evaluated_at < fitted.steps and (ends or fitted.steps == total_steps)

    def _validate(self) -> Iterator[dict[str, Any]]:
        """Evaluate, keep the model if it is the best so far, and say whether patience has run out."""
        fitted = self.fitted
        epoch = self.train.locate(fitted.steps - 1)[0] if fitted.steps else -1
        fitted.evaluated_at = fitted.steps
        if (chosen := self.rows.validation(epoch)) is None:
            return
        reader, said = chosen
        average_running_statistics(self.model)
        with averaged_weights(self.optimizer):
            row = self.row("validation", epoch, **said, **self.evaluate(reader, deciles="day" in said))
        yield {key: value for key, value in row.items() if key != "deciles"}
        if "day" in said:
            fitted.days.append(row)
        if not fitted.best:
            say_what_cannot_choose(row["tasks"], self.config)
        if is_better(row["tasks"], fitted.best, self.config):
            fitted.best, fitted.bad_evaluations = row, 0
            with averaged_weights(self.optimizer):
                self.checkpoints.save_best(weights_now(self.model, fitted, self.schema.dataset_id, self._values))
        else:
            fitted.bad_evaluations += 1
        fitted.stopped_early = fitted.bad_evaluations >= (self.config.patience or math.inf)

    def train_segment(self, batches: Prefetcher, epoch: int, until: int) -> Generator[dict[str, Any], None, bool]:
        """Train up to step ``until`` and empty the pipeline, so that evaluation and position are exact.

        Checkpoints on the way need no empty pipeline: a batch in flight has not touched a weight. They are written
        only where the over-arch has just been updated, so that none holds a half of accumulated gradients.

        Returns:
            whether a checkpoint is due after the last step.
        """
        fitted, train, checkpoints = self.fitted, self.train, self.checkpoints
        self.schedule.set(fitted.steps)
        window = Window(fitted.steps, batches)

        def around() -> AbstractContextManager[None]:
            if self.accumulation is None:
                return nullcontext()
            # Also once more after the last step, to find that there are no further batches.
            rows = train.rows_in_step(fitted.steps) if fitted.steps < until else 0
            return self.accumulation.batch(rows, self._updates_dense_at(fitted.steps + 1))

        is_due = is_time = False
        for loss, logits, labels, weights, _ in run_steps(self.pipeline, islice(batches, until - fitted.steps), around):
            window.losses.append(loss)
            self.running.update(logits, labels, weights)
            window.samples += train.rows_in_step(fitted.steps)
            fitted.steps += 1
            self.schedule.set(fitted.steps)
            self.adaptation.after(fitted.steps)
            self._beat(f"step {fitted.steps}")
            is_due = self._is_due(checkpoints.config.every_steps)
            if not self._is_due(self.config.log_every) and fitted.steps < until and not is_due:
                continue
            row, stop, is_time = self._close_window(window, epoch)
            yield row
            window = Window(fitted.steps, batches)
            if stop:
                checkpoints.save_training(self.state_dict())
                checkpoints.finish()
                raise Preempted(f"asked to stop at step {fitted.steps}")
            if (is_due or is_time) and fitted.steps < until:
                checkpoints.save_training(self.state_dict())
        return is_due or is_time

    def _updates_dense_at(self, step: int) -> bool:
        """Return whether the over-arch is updated with a step (from 1): the last of ``accumulate``, or of the run."""
        return step % self.config.accumulate == 0 or step == self.total_steps

    def _is_due(self, every: int | None) -> bool:
        """Return whether what is done every so many steps is due now: with an update of the over-arch."""
        step, group = self.fitted.steps, self.config.accumulate
        return every is not None and step % group == 0 and step // every > (step - group) // every

    def _close_window(self, window: Window, epoch: int) -> tuple[dict[str, Any], bool, bool]:
        """Sum up the steps of a window and look at their losses.

        Returns:
            the progress row, whether any rank was asked to stop, and whether rank 0's clock wants a checkpoint.
        """
        fitted, config = self.fitted, self.config
        asked = [float(self._asked_to_stop()), float(self.checkpoints.is_time() and dist.get_rank() == 0)]
        if not self._updates_dense_at(fitted.steps):
            asked = [0.0, 0.0]  # the next window asks again
        filters = self.filter_watch.figures().to(window.losses[0])
        sums = torch.cat([torch.stack(window.losses), window.losses[0].new_tensor(asked), filters])
        dist.all_reduce(sums)
        losses, rest = sums[: len(window.losses)].double().cpu(), sums[len(window.losses) :].tolist()
        stop, is_time, *filtered = rest
        seconds, wait_seconds = time.perf_counter() - window.clock, window.batches.wait_seconds - window.waited
        fitted.count(window.samples, seconds, wait_seconds)
        fitted.epochs = self.train.epochs_done(fitted.steps)
        good = is_good(losses, config.max_loss)
        trained = losses[good] if config.skip_bad_steps and good.any() else losses
        row = self.row(
            "train",
            epoch,
            loss=trained.mean().item(),
            samples_per_s=window.samples / seconds,
            data_wait=wait_seconds / seconds,
            lr=self.schedule.rate(fitted.steps - 1),
            tasks=self.running.compute(),
            **({"filters": per_layer(filtered)} if filtered else {}),
            **self.model.module.loss.figures(),
        )
        if not good.all():
            fitted.skipped += int((~good).sum())
            note_bad_steps(self.train, window.first_step, losses, good, fitted.skipped, config.skip_bad_steps)
        return row, bool(stop), bool(is_time)
