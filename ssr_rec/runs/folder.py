"""Creates a run folder on disk, writes it so that a crash leaves it readable, and reads it back.

``runs/<name>/`` holds ``config.yaml``, ``metrics.jsonl`` (one row per progress line and evaluation), ``report.json``
(final figures), ``curves.png``, ``tensorboard/`` and ``checkpoints/``. Only rank 0 writes.

JSON has no nan: a measure that is not defined is written as null and read back as None.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import partial_files, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG_FILE = "config.yaml"
JOB_FILE = "job"
"""Holds the launcher's id of the job, by which a restarted job without a name finds its run folder again."""
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
TENSORBOARD_FOLDER = "tensorboard"


def create_run_folder(runs: str | Path, name: str | None, stem: str = "run") -> Path:
    """Create ``runs/name``, or ``runs/<stem>-<YYYYmmdd-HHMMSS>`` (local time) without a name. For rank 0.

    A folder that a process was killed in before it had written its config is as good as none.

    Raises:
        UserError: the folder has something in it, or cannot be made.
    """
    runs = Path(runs)
    try:
        if name is None:
            return _create_timed_folder(runs, stem)
        folder = runs / name
        if folder.exists() and (not folder.is_dir() or _has_more_than_a_start(folder)):
            raise UserError(f"run folder {folder} is not empty; choose another name, resume that run, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs={runs}: cannot make a run folder there: {error.strerror}; give another") from None
    return folder


def _has_more_than_a_start(folder: Path) -> bool:
    """Return whether the folder holds more than what is there before its config: the job's id and unfinished files."""
    started = {JOB_FILE, *(path.name for path in partial_files(folder))}
    return any(path.name not in started for path in folder.iterdir())


def _create_timed_folder(runs: Path, stem: str) -> Path:
    """Return a fresh folder named by the time; runs started in the same second get a number."""
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


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all; nan becomes null, NumPy and torch scalars plain numbers."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append one row to a JSON-lines file, first cutting off a last line that a crash left unfinished."""
    line = json.dumps(plain(row), allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)


def plain(value: Any) -> Any:
    """Return ``value`` as JSON types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in order; [] when the file is not there yet.

    An unfinished last line is left out. A resumed run repeats the steps after its checkpoint: the later rows count.

    Raises:
        UserError: a line is not JSON; names the file and the line.
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
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if row["split"] != "test" and rows and _repeats(row, rows):
            rows = [earlier for earlier in rows if earlier["step"] < row["step"] and earlier["split"] != "test"]
        rows.append(row)
    return rows


def _repeats(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Return whether ``row`` is a resumed run's first: it goes back in steps, repeats a row, or follows the end."""
    last = rows[-1]
    same = any(earlier["step"] == row["step"] and earlier["split"] == row["split"] for earlier in rows[-2:])
    return same or row["step"] < last["step"] or last["split"] == "test"


def open_tensorboard(folder: str | Path, first_step: int = 0) -> SummaryWriter:
    """Return a writer of ``folder/tensorboard``; for rank 0, close it at the end.

    Args:
        first_step: steps done already; what an interrupted run wrote of later ones is not shown.
    """
    # Imported here: tensorboard takes about a second, and readers of run folders do not need it.
    from torch.utils.tensorboard import SummaryWriter

    purge_step = first_step + 1 if first_step else None
    return SummaryWriter(str(Path(folder) / TENSORBOARD_FOLDER), purge_step=purge_step)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a metrics.jsonl row as ``<split>/loss``, ``<split>/<label>/auc``, ``<split>/filters/layer_1/sparsity``."""
    split = row["split"]
    found = {f"{split}/{name}": row.get(name) for name in ("loss", "lr", "samples_per_s", "data_wait")}
    for label, measures in (row.get("tasks") or {}).items():
        found |= {f"{split}/{label}/{name}": value for name, value in measures.items()}
    for layer, measures in enumerate(row.get("filters") or [], start=1):
        found |= {f"{split}/filters/layer_{layer}/{name}": value for name, value in measures.items()}
    found |= {f"{split}/task_weights/{task}": value for task, value in (row.get("task_weights") or {}).items()}
    return {name: value for name, value in found.items() if value is not None}
