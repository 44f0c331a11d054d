"""Runs a search: trains its trials, several at a time, and ends those that the pruner gives up.

A trial is a training in a process and a run folder of its own. One that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssr_rec.common.formatting import decimal, duration
from ssr_rec.common.whole_files import write_text
from ssr_rec.config.run import RunConfig, dump_config
from ssr_rec.config.training import TrainConfig, larger_is_better
from ssr_rec.runs.exit_codes import BAD_INPUT
from ssr_rec.runs.folder import METRICS_FILE, read_metrics
from ssr_rec.runs.report import read_report
from ssr_rec.runs.tracking import Ended, end_killed
from ssr_rec.studies.runner import (
    CONFIGS_FOLDER,
    LOGS_FOLDER,
    RUNS_FOLDER,
    TRAIN_COMMAND,
    Clock,
    Say,
    how_it_ended,
    start_training,
    stop_trainings,
)
from ssr_rec.studies.search_space import config_of
from ssr_rec.studies.trials import Taken, TrialBook
from ssr_rec.training.monitor import monitored

SECONDS_BETWEEN_LOOKS = 0.25
MOST_STARTS = 3
"""Trainings of one trial that may be killed, before it counts as failed."""


@dataclass
class Training:
    taken: Taken
    popen: subprocess.Popen[bytes]
    cores: list[int]
    begun: float
    bytes_read: int = 0


class Tuner:
    """Trains the trials of a search.

    Args:
        data: the prepared dataset's folder, as the runs will name it.
        workers: trainings at a time, which share the cores of this process evenly.
        command: is given ``--config FILE`` and makes the run folder that the file names.
        say: takes the progress lines.
    """

    def __init__(
        self, book: TrialBook, data: str, workers: int, command: Sequence[str] = TRAIN_COMMAND, say: Say = print
    ) -> None:
        self.book, self.data, self.command, self.say = book, data, command, say
        cores = sorted(os.sched_getaffinity(0))
        self.free = [cores[i::workers] or [cores[i % len(cores)]] for i in range(workers)]
        self.running: list[Training] = []
        self.telling: list[threading.Thread] = []
        self.clock = Clock(workers)
        for folder in (RUNS_FOLDER, CONFIGS_FOLDER, LOGS_FOLDER):
            (book.out / folder).mkdir(exist_ok=True)

    def run(self) -> None:
        """Train until all trials have ended, also those that other processes work on now.

        Stopped by an exception, it leaves its trials to whoever works on the search next.
        """
        try:
            while True:
                while self.free and (taken := self.book.take()) is not None:
                    self._start(taken, self.free.pop(0))
                if not self.running and not self.book.in_state("RUNNING"):
                    return
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for training in list(self.running):
                    self._look_at(training)
        finally:
            stop_trainings([training.popen for training in self.running])
            for training in self.running:
                self.book.count_start(training.taken, by=-1)
                self.book.leave(training.taken)
            for thread in self.telling:
                thread.join()

    def _start(self, taken: Taken, cores: list[int]) -> None:
        out, name = self.book.out, taken.name
        config = config_of(self.book.tuning, taken.point, self.data, f"trial {name}")
        own = {"name": name, "runs": str(out / RUNS_FOLDER), "resume": "auto"}
        config_file = out / CONFIGS_FOLDER / f"{name}.yaml"
        write_text(config_file, dump_config(config.model_copy(update=own)))
        self.book.count_start(taken)
        popen = start_training(self.command, config_file, self._log(taken), cores, taken.lock)
        self.running.append(Training(taken, popen, cores, time.monotonic()))

    def _look_at(self, training: Training) -> None:
        """Take in what a training has written, and that it has ended."""
        code = training.popen.poll()
        gives_up = self._report_evaluations(training)
        if code is None and not gives_up:
            return
        self.running.remove(training)
        if gives_up and code != 0:
            # A checkpoint of it is of no use, so it is not asked to stop.
            training.popen.kill()
            training.popen.wait()
            self._tell_trackers(training, "pruned")
            self._end(training, "PRUNED")
        else:
            assert code is not None
            self._finish(training, code)

    def _report_evaluations(self, training: Training) -> bool:
        """Note the evaluations that are new in metrics.jsonl; return whether the pruner wants the trial to end."""
        path = self.book.out / RUNS_FOLDER / training.taken.name / METRICS_FILE
        size = path.stat().st_size if path.is_file() else 0
        if size == training.bytes_read:
            return False
        training.bytes_read = size
        gives_up = False
        for row in read_metrics(path):
            if row["split"] == "validation" and row["step"] > training.taken.reported:
                value = objective(row["tasks"], self.book.train)
                if not math.isnan(value):
                    gives_up = self.book.report(training.taken, row["step"], value)
        return gives_up

    def _finish(self, training: Training, code: int) -> None:
        taken, folder = training.taken, self.book.out / RUNS_FOLDER / training.taken.name
        if code == 0:
            report = read_report(folder)
            value = objective(report.judged, self.book.train)
            if math.isnan(value):
                self._end(training, "FAIL", notes={"problem": f"validation has no {self.book.train.monitor}"})
                return
            notes = {key: getattr(report, key) for key in ("seconds", "steps", "best_step")}
            self._end(training, "COMPLETE", value, notes)
            return
        self.say(how_it_ended(code, self._log(taken)))
        if code != BAD_INPUT and taken.starts < MOST_STARTS:
            self.say(f"trial {taken.trial.number} goes on; start {taken.starts + 1} of {MOST_STARTS}")
            self._start(taken, training.cores)
        else:
            self._tell_trackers(training, "failed")
            self._end(training, "FAIL", notes={"problem": f"exit code {code}"})

    def _tell_trackers(self, training: Training, how: Ended) -> None:
        """Say how a killed training's run ended, in a thread: a server that is gone must not hold up other trials."""
        taken = training.taken
        config = config_of(self.book.tuning, taken.point, self.data, f"trial {taken.name}")
        folder = self.book.out / RUNS_FOLDER / taken.name
        self.telling.append(threading.Thread(target=end_killed, args=(config, folder, how), name=f"end-{taken.name}"))
        self.telling[-1].start()

    def _end(
        self, training: Training, state: str, value: float | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        book, taken = self.book, training.taken
        book.end(taken, state, value, notes)
        self.free.append(training.cores)
        seconds = time.monotonic() - training.begun
        ended, best = len(book.in_state("COMPLETE", "PRUNED", "FAIL")), book.best()
        result = {
            "COMPLETE": decimal(value),
            "PRUNED": f"pruned at step {taken.reported}",
            "FAIL": f"FAILED, {(notes or {}).get('problem')}",
        }[state]
        record = f"best {decimal(best.value)} of trial {best.number}" if best is not None else "none complete"
        settings = " ".join(f"{key}={short(value)}" for key, value in taken.point.items())
        eta = duration(self.clock.eta(seconds, book.tuning.trials - ended))
        self.say(
            f"[{ended}/{book.tuning.trials}] trial {taken.trial.number}  {result}  ({record})  {settings}"
            f"  {duration(seconds)}  eta {eta}"
        )

    def _log(self, taken: Taken) -> Path:
        return self.book.out / LOGS_FOLDER / f"{taken.name}.log"


def objective(tasks: dict[str, dict[str, Any]], train: TrainConfig) -> float:
    """Return the figure that a search is for, in its own sign; nan where it is not defined."""
    known = {
        task: {name: math.nan if value is None else value for name, value in measures.items()}
        for task, measures in tasks.items()
    }
    value = monitored(known, train)
    if value == -math.inf:
        return math.nan
    return value if larger_is_better(train.monitor) else -value


def metric_name(train: TrainConfig) -> str:
    """Return what people call the objective, such as ``validation auc of click``."""
    return f"validation {train.monitor}" + (f" of {train.monitor_task}" if train.monitor_task else "")


def short(value: Any) -> str:
    """Return a setting in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


def best_config(book: TrialBook, data: str) -> RunConfig | None:
    """Return the run of the best trial under no name yet, to be trained again anywhere; None without any."""
    best = book.best()
    return None if best is None else config_of(book.tuning, book.point(best), data, f"trial {best.number}")
