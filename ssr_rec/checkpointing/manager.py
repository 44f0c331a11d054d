"""Decides when checkpoints are written, in the background, every so many steps or minutes, and keeps the last few."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssr_rec.checkpointing.format import PARTIAL, Tensors, read_info, staged, write_checkpoint
from ssr_rec.common.errors import UserError
from ssr_rec.config.checkpointing import CheckpointConfig

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"


TRAINING, BEST = "step-", "best-"
Contents = tuple[Tensors, Mapping[str, Any]]


class CheckpointManager:
    """Writes ``checkpoints/step-<N>`` (everything) and ``checkpoints/best-<N>`` (weights) of a run folder.

    A checkpoint that cannot be written (disk full) is reported and the run goes on with the ones before; best weights
    that cannot be written end it. All methods are collective unless they say otherwise.

    Attributes:
        failures: training checkpoints that could not be written.
        best_step: step of the best weights so far, 0 before there are any.
        last_step: step of the last training checkpoint, 0 before there is any.
    """

    def __init__(self, config: CheckpointConfig, run_folder: Path) -> None:
        self.config, self.folder = config, run_folder / CHECKPOINTS_FOLDER
        self.failures = self.best_step = self.last_step = 0
        self._saved_at = time.monotonic()
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ssr_rec-saver")
        self._pending: Future[None] | None = None
        self._pending_is_best = False
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f".*{PARTIAL}"):
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()
        sees = [False] * dist.get_world_size()
        dist.all_gather_object(sees, self.folder.is_dir())
        if not all(sees):
            raise UserError(
                f"runs: rank {sees.index(False)} does not see {self.folder}, which rank 0 has made; every rank writes "
                "its part of a checkpoint there, so --runs must be a folder that all nodes mount by the same path"
            )

    @property
    def best_folder(self) -> Path:
        return self.folder / f"{BEST}{self.best_step:09d}"

    def is_time(self) -> bool:
        """Return whether every_minutes have passed by this rank's clock; let one rank decide. Not collective."""
        minutes = self.config.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save_training(self, contents: Contents) -> None:
        """Write ``step-<N>``."""
        self.last_step = contents[1]["step"]
        self._start(TRAINING, contents)
        self._saved_at = time.monotonic()

    def save_best(self, contents: Contents) -> None:
        """Write ``best-<N>``, which takes the place of the best before as soon as it is there."""
        self.best_step = contents[1]["step"]
        self._start(BEST, contents)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: best weights could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            if self._pending_is_best:
                raise
            self.failures += 1
            logger.warning(f"checkpoint NOT written, training goes on: {error}")

    def _start(self, kind: str, contents: Contents) -> None:
        self.finish()
        tensors, info = contents
        self._pending_is_best = kind == BEST
        tensors = staged(tensors) if self.config.asynchronous else tensors
        folder = self.folder / f"{kind}{info['step']:09d}"
        self._pending = self._thread.submit(self._write, folder, tensors, info, self.best_folder)
        if not self.config.asynchronous:
            self.finish()

    def _write(self, folder: Path, tensors: Tensors, info: Mapping[str, Any], best: Path) -> None:
        write_checkpoint(tensors, info, folder, self._group)
        if dist.get_rank() == 0:
            prune(self.folder, self.config.keep, best)


def list_checkpoints(folder: Path, kind: str) -> list[Path]:
    """Return the checkpoints of a kind under ``checkpoints``, the latest first."""
    return sorted((path for path in folder.glob(f"{kind}*") if path.is_dir()), reverse=True)


def prune(folder: Path, keep: int, best: Path) -> None:
    """Delete all but the last ``keep`` training checkpoints, the best weights, and the best weights that those name."""
    training, bests = list_checkpoints(folder, TRAINING), list_checkpoints(folder, BEST)
    wanted = {*training[:keep], best}
    for path in training[:keep]:
        try:
            named = read_info(path)["fitted"]["best"]
        except ValueError:  # damaged since: resuming says so, and training need not end for it
            continue
        wanted |= {folder / f"{BEST}{named['step']:09d}"} if named else set()
    for path in {*training, *bests} - wanted:
        gone = path.with_name(f".{path.name}.old{PARTIAL}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
