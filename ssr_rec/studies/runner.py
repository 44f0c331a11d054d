"""Run a comparison's jobs, one training process per core, each in a run folder of its own; what is there stays.

A job is done when its folder has a report. A folder without one was killed and is run anew; a finished one whose config
differs from the wanted one is an error, because its figures are another experiment's.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.common.formatting import decimal, duration, short_number
from ssr_rec.common.whole_files import write_text
from ssr_rec.config.run import RunConfig, dump_config, load_config
from ssr_rec.config.same_run import flat_values
from ssr_rec.runs.folder import CONFIG_FILE, write_json
from ssr_rec.runs.report import REPORT_FILE, Report, read_report
from ssr_rec.studies.study import Job, Plan

TRAIN_COMMAND = (sys.executable, str(Path(__file__).parents[1] / "train.py"))
RUNS_FOLDER, CONFIGS_FOLDER, LOGS_FOLDER, WORKERS_FILE = "runs", "configs", "logs", "workers.json"
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_STOP = 10.0
TAIL_LINES = 12
Say = Callable[[str], None]


@dataclass
class Comparison:
    """Holds the state of a comparison: what is on disk and what this process runs.

    Attributes:
        reports: of every finished job.
        workers: job name -> runs that shared the machine with it, itself included.
        failed: jobs that this process ran without getting a report.
    """

    plan: Plan
    out: Path
    reports: dict[Job, Report]
    workers: dict[str, int]
    failed: set[Job] = field(default_factory=set)

    def todo(self) -> list[Job]:
        """Return the jobs known to be missing, in the order to run them."""
        wanted = self.plan.wanted(self.reports, self.failed)
        return [job for job in wanted if job not in self.reports and job not in self.failed]

    def num_done(self) -> int:
        return sum(job in self.reports for job in self.plan.wanted(self.reports, self.failed))


@dataclass
class Process:
    job: Job
    popen: subprocess.Popen[bytes]
    core: int
    log: Path
    started: float


def open_comparison(plan: Plan, out: str | Path) -> Comparison:
    """Return what a comparison's folder has of the plan; a folder that is not there yet has nothing.

    Raises:
        UserError: a finished run has another config, or is on another dataset.
    """
    out = Path(out)
    reports = {}
    for job in plan.all_jobs():
        report = report_of_job(out / RUNS_FOLDER / job.name, plan.config(job, out / RUNS_FOLDER), plan)
        if report is not None:
            reports[job] = report
    workers_file = out / WORKERS_FILE
    workers = json.loads(workers_file.read_text()) if workers_file.is_file() else {}
    return Comparison(plan, out, reports, workers)


def run_comparison(
    comparison: Comparison, workers: int, command: Sequence[str] = TRAIN_COMMAND, say: Say = print
) -> None:
    """Run what is missing. A job that fails is said, kept in ``failed`` and does not stop the others.

    Args:
        workers: runs at a time, each on one core.
        command: is given ``--config FILE`` and makes the run folder that the file names.
        say: takes the progress lines.

    Raises:
        UserError: runs of an earlier call are still going on in the folder.
    """
    for folder in (RUNS_FOLDER, CONFIGS_FOLDER, LOGS_FOLDER):
        (comparison.out / folder).mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    free = [cores[i % len(cores)] for i in range(workers)]
    running: list[Process] = []
    clock = Clock(workers)
    with locked(comparison.out) as lock:
        try:
            while True:
                busy = {process.job for process in running}
                ready = [job for job in comparison.todo() if job not in busy]
                while ready and free:
                    running.append(_start(comparison, ready.pop(0), free.pop(0), command, lock))
                if not running:
                    return
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for process in [process for process in running if process.popen.poll() is not None]:
                    running.remove(process)
                    free.append(process.core)
                    _finish(comparison, process, workers, clock, say)
        finally:
            stop_trainings([process.popen for process in running])


def report_of_job(folder: Path, config: RunConfig, plan: Plan) -> Report | None:
    """Return the report of a finished run; None where there is none.

    A run of two stages keeps the config that was asked for in its first stage's folder, ``<name>-search``; that of the
    second has what the first one found.

    Raises:
        UserError: it is the report of another experiment; names what differs.
    """
    if not (folder / REPORT_FILE).is_file():
        return None
    fix = "choose another --out, or delete the folder"
    report = read_report(folder)
    found = report.dataset.dataset_id
    if found != plan.schema.dataset_id:
        raise UserError(f"{folder} is a run on dataset {found}, not on {plan.schema.dataset_id}; {fix}")
    first_stage = search_folder(folder)
    try:
        saved = load_config((first_stage if first_stage.is_dir() else folder) / CONFIG_FILE)
    except ValueError as error:
        raise UserError(f"{error}; {fix}") from None
    differing = differences(saved, config)
    if differing:
        raise UserError(f"{folder} is a run with {'; '.join(differing)}; {fix}")
    return report


def search_folder(folder: Path) -> Path:
    """Return where a run of two stages leaves the first."""
    return folder.with_name(f"{folder.name}-search")


def differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Return ``key=saved, not wanted`` of every key that differs, but for where the run and its data lie."""
    flat_saved, flat_wanted = flat_values(saved.model_dump()), flat_values(wanted.model_dump())
    return [
        f"{key}={flat_saved.get(key)!r}, not {flat_wanted.get(key)!r}"
        for key in dict.fromkeys([*flat_saved, *flat_wanted])
        # The same dataset may be named in another way; its id is compared instead.
        if key not in ("name", "runs", "data.path") and flat_saved.get(key) != flat_wanted.get(key)
    ]


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keep others from running in a comparison's folder; the runs hold the lock too, so that orphans count.

    Raises:
        UserError: somebody has the lock.
    """
    lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{out}: runs are still going on there; wait for them, or stop them") from None
    try:
        yield lock
    finally:
        os.close(lock)


class Clock:
    """Says how long the rest will take, from the runs that ended so far."""

    def __init__(self, workers: int) -> None:
        self.workers, self.seconds, self.runs = workers, 0.0, 0

    def eta(self, seconds: float, jobs_left: int) -> float:
        """Return seconds until ``jobs_left`` more runs have ended, after one of ``seconds``."""
        self.seconds += seconds
        self.runs += 1
        return self.seconds / self.runs * jobs_left / min(self.workers, max(1, jobs_left))


def start_training(
    command: Sequence[str], config_file: Path, log: Path, cores: Collection[int], lock: int
) -> subprocess.Popen[bytes]:
    """Start a training of its own: on these cores from its first instruction on, and holding the lock, an open file."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        with open(log, "ab") as output:
            return subprocess.Popen(
                [*command, "--config", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
                pass_fds=(lock,),
            )
    finally:
        os.sched_setaffinity(0, before)


def _start(comparison: Comparison, job: Job, core: int, command: Sequence[str], lock: int) -> Process:
    runs = comparison.out / RUNS_FOLDER
    for left_by_a_killed_run in (runs / job.name, search_folder(runs / job.name)):
        if left_by_a_killed_run.exists():
            shutil.rmtree(left_by_a_killed_run)
    config_file = comparison.out / CONFIGS_FOLDER / f"{job.name}.yaml"
    write_text(config_file, dump_config(comparison.plan.config(job, runs)))
    log = comparison.out / LOGS_FOLDER / f"{job.name}.log"
    log.unlink(missing_ok=True)
    popen = start_training(command, config_file, log, {core}, lock)
    return Process(job, popen, core, log, time.monotonic())


def _finish(comparison: Comparison, process: Process, workers: int, clock: Clock, say: Say) -> None:
    """Take in a run that has ended, and say how it went."""
    job, plan, runs = process.job, comparison.plan, comparison.out / RUNS_FOLDER
    report = None
    if process.popen.returncode == 0:
        report = report_of_job(runs / job.name, plan.config(job, runs), plan)
    if report is None:
        comparison.failed.add(job)
    else:
        comparison.reports[job] = report
        comparison.workers[job.name] = workers
        write_json(comparison.out / WORKERS_FILE, comparison.workers)
    seconds = time.monotonic() - process.started
    ended = comparison.num_done() + len(comparison.failed)
    eta = clock.eta(seconds, plan.num_jobs() - ended)
    result = "FAILED" if report is None else _figures(report, plan.trials[job.system][job.trial].config.train.monitor)
    say(
        f"[{ended}/{plan.num_jobs()}] {job.system}  trial {job.trial}  seed {job.seed}  {result}"
        f"  {duration(seconds)}  eta {duration(eta)}"
    )
    if report is None:
        say(how_it_ended(process.popen.returncode, process.log))


def how_it_ended(code: int, log: Path) -> str:
    """Return the exit code of a training without a report and the end of what it said."""
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"  exit code {code}; {log} ends:", *(f"  | {line}" for line in tail)])


def _figures(report: Report, metric: str) -> str:
    figures = [f"{task} {decimal(report.measure('validation', task, metric))}" for task in report.validation]
    return f"validation {metric} {', '.join(figures)}  {short_number(report.samples_per_s or math.nan)} samples/s"


def stop_trainings(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask trainings to end, which lets them write a checkpoint, and end those that do not in time."""
    for popen in running:
        popen.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for popen in running:
        try:
            popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
