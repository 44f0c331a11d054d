"""Creates the run folder, or finds the one to go on with, or the one that has finished."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import partial_files, write_text
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.config.same_run import check_same_run, is_same_job
from ssr_rec.runs.folder import CONFIG_FILE, JOB_FILE, create_run_folder
from ssr_rec.runs.report import REPORT_FILE, Report, read_report


class Opened(NamedTuple):
    """Names a run folder to write.

    Attributes:
        goes_on: an unfinished run of this config is in it.
        lock: descriptor whose lock keeps other processes out until it is closed or this process has ended.
    """

    folder: Path
    goes_on: bool
    lock: int


def open_run_folder(config: Mapping[str, Any], stem: str, label: str) -> Opened:
    """Return the run folder, locked, and whether an unfinished run of this config is in it. For rank 0.

    ``resume: auto`` goes on with the unfinished run of ``name``; without a name, with that of the same launcher job.

    Args:
        stem: first part of the folder's name when the run has none.
        label: what is trained.

    Raises:
        UserError: the folder holds a finished run, one with another config, or something else; or another process
            writes it.
    """
    runs, name, job = Path(config["runs"]), config["name"], _job_id(label)
    if config["resume"] == "auto":
        name = name or next((folder.name for folder in _of_job(config, job) if not _is_finished(folder)), None)
        folder = runs / (name or "")
        if name is not None and (folder / CONFIG_FILE).is_file() and not _is_finished(folder):
            check_same_run(config, read_yaml(folder / CONFIG_FILE, "another run"), str(folder / CONFIG_FILE))
            return Opened(folder, True, _locked(folder))
    folder = create_run_folder(runs, name, stem)
    lock = _locked(folder)
    if job is not None:
        write_text(folder / JOB_FILE, job)
    return Opened(folder, False, lock)


def finished_report(config: Mapping[str, Any], label: str, of_stage: bool = False) -> Report | None:
    """Return the report of the run that this command has finished already, or None. For rank 0.

    Without a name that is the run of the same launcher job, if the launcher has restarted it.

    Args:
        label: what is trained.
        of_stage: it is the first of a run's two stages, which a job that was started anew goes on from, too.

    Raises:
        UserError: the run of that name has another config.
    """
    if config["resume"] != "auto":
        return None
    restarted = of_stage or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    named = [Path(config["runs"]) / config["name"]] if config["name"] else []
    for folder in named or (_of_job(config, _job_id(label)) if restarted else ()):
        if _is_finished(folder) and (folder / CONFIG_FILE).is_file():
            saved = read_yaml(folder / CONFIG_FILE, "another run")
            if of_stage:
                check_same_run(config, saved, str(folder / CONFIG_FILE))
            if of_stage or is_same_job(config, saved):
                return read_report(folder)
    return None


def _locked(folder: Path) -> int:
    """Take the folder's lock, which goes with the process, however it ends; what killed ones left half-written goes.

    Raises:
        UserError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"run folder {folder}: another process is training this run; wait for it to end, or choose another --name"
        ) from None
    for path in partial_files(folder):
        path.unlink()
    return handle


def _is_finished(folder: Path) -> bool:
    return (folder / REPORT_FILE).is_file()


def _job_id(label: str) -> str | None:
    """Return the launcher's id of this job and what it trains (an AutoFIS job trains twice); None without one."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job in ("", "none") else f"{job} {label}"


def _of_job(config: Mapping[str, Any], job: str | None) -> Iterator[Path]:
    """Yield the run folders of the launcher's job with this config; an id may be used again for another one."""
    for path in sorted(Path(config["runs"]).glob(f"*/{JOB_FILE}")):
        if job is not None and path.read_text() == job and (path.parent / CONFIG_FILE).is_file():
            saved = read_yaml(path.parent / CONFIG_FILE, "another run")
            try:
                check_same_run(config, saved, "")
            except ValueError:
                continue
            yield path.parent
