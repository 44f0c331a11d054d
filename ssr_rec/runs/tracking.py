"""Sends what a run logs to TensorBoard, MLflow or Weights & Biases.

A tracker gets what the run folder has anyway, so its faults must not reach the training: those that talk to others do
so in a thread of their own, and after its first fault a tracker is left out, which is said once.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig
from ssr_rec.config.same_run import flat_values
from ssr_rec.runs.folder import open_tensorboard, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
Ended = Literal["finished", "stopped", "failed", "pruned"]
MOST_WAITING = 10_000
MLFLOW_RUN_FILE = "mlflow_run"
"""Holds the id of the MLflow run, in which a resumed run goes on."""
SECONDS_TO_SEND = 30.0
"""How long the end of a run waits for a tracker that is behind."""


class Tracker(Protocol):
    """Is what a run is shown in, on rank 0. A resumed run goes on in the one that it began."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Take the config: ``section.key`` -> value."""

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics.jsonl."""

    def artifacts(self, paths: Sequence[Path]) -> None:
        """Take files of the run folder."""

    def close(self, how: Ended) -> None:
        """End, however the run has ended."""


class TensorBoard:
    """Writes ``tensorboard/`` in the run folder.

    Args:
        first_step: steps done already; what an interrupted run wrote of later ones is not shown.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer: SummaryWriter = open_tensorboard(folder, first_step)

    def params(self, values: Mapping[str, Any]) -> None:
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in values.items()))

    def metrics(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def artifacts(self, paths: Sequence[Path]) -> None:
        """Take nothing: TensorBoard reads the run folder, where the files are."""

    def close(self, how: Ended) -> None:
        self.writer.close()


class Apart:
    """Runs a tracker in a thread of its own, and does without it after its first fault.

    Args:
        name: what messages call it.
        open_it: opens the tracker, in the thread.
    """

    def __init__(self, name: str, open_it: Callable[[], Tracker]) -> None:
        self.name, self.fault = name, False
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(open_it,), name=f"track-{name}", daemon=True)
        self._thread.start()

    def params(self, values: Mapping[str, Any]) -> None:
        self._put(lambda tracker: tracker.params(values))

    def metrics(self, row: Mapping[str, Any]) -> None:
        self._put(lambda tracker: tracker.metrics(row))

    def artifacts(self, paths: Sequence[Path]) -> None:
        self._put(lambda tracker: tracker.artifacts(paths))

    def close(self, how: Ended) -> None:
        self._put(lambda tracker: tracker.close(how))
        self._put(None)
        self._thread.join(SECONDS_TO_SEND)
        if self._thread.is_alive():
            self._give_up(f"{self._waiting.qsize()} messages not sent {SECONDS_TO_SEND:.0f} s after the end")

    def _put(self, what: Callable[[Tracker], None] | None) -> None:
        if self.fault:
            return
        try:
            self._waiting.put_nowait(what)
        except queue.Full:
            self._give_up(f"{MOST_WAITING} messages are waiting")

    def _work(self, open_it: Callable[[], Tracker]) -> None:
        try:
            tracker = open_it()
            while not self.fault and (what := self._waiting.get()) is not None:
                what(tracker)
        except BaseException as error:  # whatever a tracking library raises, SystemExit too
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _give_up(self, why: str) -> None:
        if not self.fault:
            self.fault = True
            logger.warning(f"tracking in {self.name} ended ({why}); the run goes on, its folder has everything")


class Trackers:
    """Sends to all trackers that the config names.

    Args:
        first_step: steps that the run has done already.

    Raises:
        UserError: see ``check_trackers``.
    """

    def __init__(self, config: RunConfig, folder: Path, first_step: int) -> None:
        check_trackers(config)
        openers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder, first_step),
            "mlflow": lambda: Apart("MLflow", lambda: _mlflow(config, folder)),
            "wandb": lambda: Apart("Weights & Biases", lambda: _wandb(config, folder)),
        }
        self.all = [openers[name]() for name in dict.fromkeys(config.track.to)]
        values = flat_values(config.model_dump(mode="json"))
        for tracker in self.all:
            tracker.params(values)

    def metrics(self, row: Mapping[str, Any]) -> None:
        for tracker in self.all:
            tracker.metrics(row)

    def finish(self, paths: Sequence[Path]) -> None:
        """End a finished run, with files of its folder."""
        for tracker in self.all:
            tracker.artifacts(paths)
        self.close("finished")

    def close(self, how: Ended) -> None:
        """End; a second call does nothing."""
        for tracker in self.all:
            tracker.close(how)
        self.all = []


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose library is not installed.

    Raises:
        UserError: names it and how to install it.
    """
    for name in config.track.to:
        if find_spec(name) is None:
            raise UserError(f"track.to: {name} is not installed; pip install 'ssr_rec[track]', or leave it out")


def end_killed(config: RunConfig, folder: Path, how: Ended) -> None:
    """Say in MLflow how a run has ended whose process was killed and could not say so itself.

    Waits 30 s at most for a server. Weights & Biases sees by itself that a process is gone.
    """
    if "mlflow" in config.track.to and (folder / MLFLOW_RUN_FILE).is_file():
        Apart("MLflow", lambda: _mlflow(config, folder)).close(how)


def _mlflow(config: RunConfig, folder: Path) -> Tracker:
    # Imported here, in the tracker's thread: each takes seconds, and is an extra.
    from ssr_rec.runs.track_mlflow import Mlflow

    return Mlflow(folder, config.track.project, config.track.mlflow_uri)


def _wandb(config: RunConfig, folder: Path) -> Tracker:
    from ssr_rec.runs.track_wandb import Wandb

    return Wandb(folder, config.track.project, config.track.wandb_mode)
