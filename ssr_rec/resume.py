"""Where a run starts: in which folder, from which checkpoint, and whether that is a checkpoint of this very run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ssr_rec.checkpoint import INFO_FILE, PARTIAL, read_info, verify
from ssr_rec.config import RunConfig
from ssr_rec.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, REPORT_FILE, create_run_folder, read_report
from ssr_rec.saver import BEST, TRAINING, list_checkpoints
from ssr_rec.yaml_file import read_yaml

JOB_FILE = "job"
"""Holds the launcher's id of the job, by which a restarted job without a name finds its run folder again."""

MAY_DIFFER = (
    "name", "runs", "resume", "warm_start", "warm_start_optimizer", "device", "sharding", "checkpoint", "data.path",
    "data.synthetic_root", "data.prefetch", "train.epochs", "train.max_steps", "train.patience",
    "train.eval_batch_size", "train.log_every", "train.stall_timeout_s", "train.skip_bad_steps", "train.max_loss",
    "train.metrics", "train.metrics_rows", "train.pipeline",
)  # fmt: skip
"""Config keys that a resumed run may change: they decide when it ends or how it runs, not what the next step does."""
MAY_NOT_DIFFER = ("sharding.qcomms",)
"""Those among them that do."""


class Start(NamedTuple):
    folder: Path
    checkpoint: Path | None
    """None: from the beginning."""
    info: dict[str, Any]
    """Of the checkpoint, else {}."""


def open_run_folder(config: Mapping[str, Any], stem: str, label: str) -> tuple[Path, bool]:
    """The run folder, and whether an unfinished run of this config is in it. For rank 0.

    ``resume: auto`` goes on with the unfinished run of ``name``; without a name, with that of the same launcher job.

    Args:
        stem: first part of the folder's name when the run has none.
        label: what is trained.

    Raises:
        ValueError: the folder holds a finished run, one with another config, or something else.
    """
    runs, name, job = Path(config["runs"]), config["name"], _job_id(label)
    if config["resume"] == "auto":
        name = name or _name_of_job(runs, job)
        folder = runs / (name or "")
        if name is not None and (folder / CONFIG_FILE).is_file() and not (folder / REPORT_FILE).exists():
            check_same_run(config, read_yaml(folder / CONFIG_FILE, "another run"), str(folder / CONFIG_FILE))
            return folder, True
    folder = create_run_folder(runs, name, stem)
    if job is not None:
        (folder / JOB_FILE).write_text(job)
    return folder, False


def finished_report(config: Mapping[str, Any], label: str) -> dict[str, Any] | None:
    """The report of a first stage that this job finished before it was restarted, or None.

    Args:
        label: what the stage trains.

    Raises:
        ValueError: the run of that name has another config.
    """
    runs, name = Path(config["runs"]), config["name"] or _name_of_job(Path(config["runs"]), _job_id(label))
    if config["resume"] != "auto" or name is None or not (runs / name / REPORT_FILE).is_file():
        return None
    where = runs / name / CONFIG_FILE
    check_same_run(config, read_yaml(where, "another run"), str(where))
    return read_report(runs / name)


def _job_id(label: str) -> str | None:
    """The launcher's id of this job and what it trains (an AutoFIS job trains twice); None without a launcher."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job in ("", "none") else f"{job} {label}"


def _name_of_job(runs: Path, job: str | None) -> str | None:
    return next((path.parent.name for path in runs.glob(f"*/{JOB_FILE}") if path.read_text() == job), None)


def find_start(config: Mapping[str, Any], folder: Path, goes_on: bool, note: Callable[[str], None]) -> Start:
    """The checkpoint to start from: the last good one of this run, or the one that ``resume`` names. Collective.

    Raises:
        ValueError: there are checkpoints but none is good, or they are of another run.
    """
    resume = config["resume"]
    if resume not in ("auto", "never"):
        source = Path(resume)
        found = [source] if (source / INFO_FILE).exists() else _training_checkpoints(source)
        if not found:
            raise ValueError(f"resume={resume}: no checkpoint and no run folder with one; see {resume}/checkpoints")
    else:
        found = _training_checkpoints(folder) if goes_on else []
    problems = []
    for checkpoint in found:
        try:
            verify(checkpoint)
            info = read_info(checkpoint)
        except ValueError as error:
            problems.append(str(error))
            note(f"skipped a checkpoint: {error}")
            continue
        if info["kind"] != "training":
            raise ValueError(f"{checkpoint}: holds weights alone; start from them with --warm_start={checkpoint}")
        check_same_run(config, info["config"], str(checkpoint))
        if goes_on and dist.get_rank() == 0:
            for damaged in found[: found.index(checkpoint)]:  # out of the way of those to come
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
        dist.barrier()
        return Start(folder, checkpoint, info)
    if problems:
        raise ValueError(
            f"no good checkpoint among {len(problems)}: {problems[0]}. Bring the files back, or start anew: another "
            "--name, or --warm_start from best weights"
        )
    return Start(folder, None, {})


def recover_best(start: Start, step: int, note: Callable[[str], None]) -> bool:
    """See that the best weights of ``step`` that a checkpoint names are in the run folder. Collective.

    Returns:
        False when they are lost or damaged; the best has to be found anew.
    """
    assert start.checkpoint is not None
    name = f"{BEST}{step:09d}"
    source, place = start.checkpoint.parent / name, start.folder / CHECKPOINTS_FOLDER / name
    try:
        verify(source)
    except ValueError as error:
        note(f"the best weights so far are lost, looking for new ones: {error}")
        return False
    if dist.get_rank() == 0 and source.resolve() != place.resolve():
        work = place.with_name(f".{name}{PARTIAL}")
        shutil.copytree(source, work, dirs_exist_ok=True)
        work.rename(place)
    dist.barrier()
    return True


def _training_checkpoints(run_folder: Path) -> list[Path]:
    """The same on every rank, however late a shared disk shows them."""
    found = [list_checkpoints(run_folder / CHECKPOINTS_FOLDER, TRAINING)]
    dist.broadcast_object_list(found)
    return found[0]


def check_same_run(config: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a run whose next step would not be this config's.

    A key that the other run does not have is newer than it and had what is now its default.

    Raises:
        ValueError: names the keys that differ with both values.
    """
    mine, theirs, defaults = _flat(config), _flat(other), _flat(RunConfig().model_dump(mode="json"))
    theirs |= {key: defaults[key] for key in mine if key in defaults and key not in theirs}
    for key in sorted({*mine, *theirs}):
        allowed = _is_among(MAY_DIFFER, key) and not _is_among(MAY_NOT_DIFFER, key)
        if not allowed and mine.get(key) != theirs.get(key):
            there, here = (" ".join(str(values.get(key)).split())[:200] for values in (theirs, mine))
            raise ValueError(
                f"{where}: that run had {key}={there}, this one has {here}; give the new "
                "run another --name (and --warm_start to begin with the old weights), or use the old config"
            )


def _is_among(names: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
