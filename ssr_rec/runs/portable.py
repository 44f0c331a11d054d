"""Keeps a run and its dataset together in one folder that can be copied, packed and moved: what an estimator is."""

from __future__ import annotations

import io
import os
import platform
import shutil
import tarfile
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import write_text
from ssr_rec.config.run import dump_config, load_config
from ssr_rec.data.schema import SCHEMA_FILE
from ssr_rec.runs.folder import CONFIG_FILE, TENSORBOARD_FOLDER
from ssr_rec.runs.report import REPORT_FILE, read_report, write_report

DATA_FOLDER = "data"
"""Of a run folder that brings its dataset along."""
RUN_FOLDER = "run"


class PortableRun:
    """Holds a run folder and its prepared dataset, in a temporary folder of its own or where they lie already.

    Pickled and copied, it takes along what scoring needs: the run, and of the dataset its schema and vocabularies.

    Args:
        folder: a run folder to stay in; None: a temporary folder, which goes with this object.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary: TemporaryDirectory[str] | None = None
        self.cache: dict[str, Any] = {}
        if folder is not None:
            self.run, self.data = folder, folder / DATA_FOLDER
            return
        self._temporary = TemporaryDirectory(prefix="ssr_rec.")
        self.run = Path(self._temporary.name) / RUN_FOLDER
        self.data = Path(self._temporary.name) / DATA_FOLDER

    def copy_to(self, path: Path, with_rows: bool) -> None:
        """Make ``path`` a run folder, whole or not at all, whose dataset is the folder ``data`` in it.

        Args:
            with_rows: also the rows of the dataset, which export and further training need.

        Raises:
            UserError: there is something at ``path``.
        """
        path = path.absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: there is something in it; choose another folder, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            shutil.copytree(self.run, work, ignore=shutil.ignore_patterns(DATA_FOLDER))
            shutil.copytree(self.data, work / DATA_FOLDER, ignore=None if with_rows else _rows)
            config = load_config(work / CONFIG_FILE)
            moved = {"name": path.name, "runs": str(path.parent)}
            data = config.data.model_copy(update={"path": str(path / DATA_FOLDER)})
            write_text(work / CONFIG_FILE, dump_config(config.model_copy(update={**moved, "data": data})))
            if (work / REPORT_FILE).is_file():
                write_report(work, read_report(work).model_copy(update={"name": path.name}))
            if path.exists():
                path.rmdir()
            os.rename(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def __getstate__(self) -> dict[str, bytes]:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as file:
            file.add(self.run, RUN_FOLDER, filter=_needed)
            file.add(self.data, DATA_FOLDER, filter=_needed)
        return {"packed": packed.getvalue()}

    def __setstate__(self, state: dict[str, bytes]) -> None:
        self.__init__()  # type: ignore[misc]
        assert self._temporary is not None
        if not hasattr(tarfile, "data_filter"):
            raise UserError(
                f"Python {platform.python_version()} cannot unpack it safely: take 3.10.12, 3.11.4 or newer"
            )
        with tarfile.open(fileobj=io.BytesIO(state["packed"])) as file:
            file.extractall(self._temporary.name, filter="data")


def _rows(folder: str, names: list[str]) -> list[str]:
    """Return what of a dataset's folder scoring does not need: the folders of its splits."""
    if not (Path(folder) / SCHEMA_FILE).is_file():
        return []
    return [name for name in names if name not in (SCHEMA_FILE, "vocabularies")]


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = Path(entry.name).parts
    if parts[0] == RUN_FOLDER:
        return None if {TENSORBOARD_FOLDER, DATA_FOLDER} & set(parts[1:]) else entry
    return entry if len(parts) == 1 or parts[1] in (SCHEMA_FILE, "vocabularies") else None
