"""A run folder on disk: creating it, writing it so that a crash leaves it readable, reading it back.

``runs/<name>/`` holds ``config.yaml``, ``metrics.jsonl`` (one row per progress line and evaluation), ``report.json``
(final figures), ``curves.png``, ``tensorboard/`` and ``checkpoints/``. Only rank 0 writes.

JSON has no nan: a measure that is not defined is written as null and read back as None.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
CURVES_FILE = "curves.png"
TENSORBOARD_FOLDER = "tensorboard"
CHECKPOINTS_FOLDER = "checkpoints"


class Run(NamedTuple):
    report: dict[str, Any]
    """report.json."""
    rows: list[dict[str, Any]]
    """metrics.jsonl."""


def create_run_folder(runs: str | Path, name: str | None, stem: str = "run") -> Path:
    """Create ``runs/name``, or ``runs/<stem>-<YYYYmmdd-HHMMSS>`` (local time) without a name. For rank 0.

    Raises:
        ValueError: the name is not that of one folder, or the folder has something in it.
    """
    runs = Path(runs)
    if name is None:
        return _create_timed_folder(runs, stem)
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"run name {name!r} must be the name of one folder under {runs}, such as {stem!r}")
    folder = runs / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"run folder {folder} is not empty; choose another name, resume that run, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _create_timed_folder(runs: Path, stem: str) -> Path:
    """A fresh folder named by the time; runs started in the same second get a number."""
    # A stem is made of dataset and model names, which may hold what a folder name may not.
    base = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = runs / (base if number == 1 else f"{base}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: a crash leaves the old one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all; nan becomes null, NumPy and torch scalars plain numbers."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append one row to a JSON-lines file, first cutting off a last line that a crash left unfinished."""
    line = json.dumps(_plain(row), allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)


def _plain(value: Any) -> Any:
    """``value`` as JSON types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order; [] when the file is not there yet.

    An unfinished last line is left out. A resumed run repeats the steps after its checkpoint: the later rows count.

    Raises:
        ValueError: a line is not JSON; names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if row["split"] != "test" and rows and _repeats(row, rows):
            rows = [earlier for earlier in rows if earlier["step"] < row["step"] and earlier["split"] != "test"]
        rows.append(row)
    return rows


def _repeats(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether ``row`` is the first of a resumed run: it goes back in steps, repeats a row, or follows the end."""
    last = rows[-1]
    same = any(earlier["step"] == row["step"] and earlier["split"] == row["split"] for earlier in rows[-2:])
    return same or row["step"] < last["step"] or last["split"] == "test"


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        ValueError: no such run, a run without a report (unfinished), or a report that is not JSON or lacks an entry.
    """
    path = Path(folder) / REPORT_FILE
    if not path.parent.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    if not path.is_file():
        raise ValueError(f"{folder}: no {REPORT_FILE}; the run has not finished, or this is not a run folder")
    try:
        report = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for key in ("name", "over_arch", "test", "dataset"):
        if key not in report:
            raise ValueError(f"{path}: no entry {key!r}; not the report of a training run")
    return report


def read_run(folder: str | Path) -> Run:
    """Report and history of a finished run; errors as in ``read_report`` and ``read_metrics``."""
    return Run(read_report(folder), read_metrics(Path(folder) / METRICS_FILE))


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "torchrec": _installed("torchrec", "torchrec-cpu"),
        "fbgemm_gpu": _installed("fbgemm-gpu", "fbgemm-gpu-cpu"),
        "triton": _installed("triton"),
        "numpy": np.__version__,
    }


def _installed(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB, and the GPUs of this host (an empty list without any)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    """The name in /proc/cpuinfo, else the architecture: ARM and other systems do not have it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit(folder: str | Path = Path(__file__).parent) -> str | None:
    """Commit of the checkout the code runs from, ending in ``-dirty`` when ``git status`` shows changes.

    None without git, outside a checkout, or for a folder that the surrounding checkout does not track, such as a
    package installed in a virtual environment.
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return f"{commit}-dirty" if commit and changes else commit


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What a git command prints; None when it fails or there is no git."""
    try:
        # No optional locks: status would otherwise rewrite the index under somebody's running git command.
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def open_tensorboard(folder: str | Path, first_step: int = 0) -> SummaryWriter:
    """A writer of ``folder/tensorboard``; for rank 0, close it at the end.

    Args:
        first_step: steps done already; what an interrupted run wrote of later ones is not shown.
    """
    # Imported here: tensorboard takes about a second, and readers of run folders do not need it.
    from torch.utils.tensorboard import SummaryWriter

    purge_step = first_step + 1 if first_step else None
    return SummaryWriter(str(Path(folder) / TENSORBOARD_FOLDER), purge_step=purge_step)


def write_scalars(writer: SummaryWriter, row: Mapping[str, Any]) -> None:
    """Write a metrics.jsonl row as ``<split>/loss``, ``<split>/<label>/auc``, ... against the step."""
    split = row["split"]
    for name in ("loss", "lr", "samples_per_s", "data_wait"):
        if row.get(name) is not None:
            writer.add_scalar(f"{split}/{name}", row[name], row["step"])
    for label, measures in (row.get("tasks") or {}).items():
        for name, value in measures.items():
            if value is not None:
                writer.add_scalar(f"{split}/{label}/{name}", value, row["step"])
