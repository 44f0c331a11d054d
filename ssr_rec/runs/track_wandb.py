"""Shows a run in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb

from ssr_rec.common.whole_files import write_text
from ssr_rec.runs.folder import scalars
from ssr_rec.runs.tracking import Ended

RUN_FILE = "wandb_run"
"""Holds the id of the W&B run, in which a resumed run goes on."""


class Wandb:
    """Is the W&B run of a run folder; offline it lies in ``wandb/`` there, for ``wandb sync``."""

    def __init__(self, folder: Path, project: str, mode: Literal["offline", "online"]) -> None:
        id_file = folder / RUN_FILE
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        self.run = wandb.init(
            project=project,
            name=folder.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A resumed run repeats steps, which W&B's own counter would refuse.
        self.run.define_metric("*", step_metric="step")
        write_text(id_file, f"{self.run.id}\n")

    def params(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def metrics(self, row: Mapping[str, Any]) -> None:
        self.run.log({**scalars(row), "step": row["step"]})

    def artifacts(self, paths: Sequence[Path]) -> None:
        artifact = wandb.Artifact(f"run-{self.run.id}", type="run_folder")
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self, how: Ended) -> None:
        self.run.finish(exit_code=0 if how == "finished" else 1)
