"""Shows a run in MLflow."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from ssr_rec.common.whole_files import write_text
from ssr_rec.runs.folder import scalars
from ssr_rec.runs.tracking import MLFLOW_RUN_FILE, Ended

MOST_PARAMS, MOST_CHARACTERS = 100, 500
STATUS: dict[Ended, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "pruned": "KILLED"}
ENDED_TAG = "ssr_rec.ended"
"""Says how a run ended, since MLflow has one status for what was stopped and what was pruned."""


class Mlflow:
    """Is the MLflow run of a run folder.

    Args:
        project: name of the experiment; made if it is not there.
        uri: the server or store; None: what MLflow is set to.
    """

    def __init__(self, folder: Path, project: str, uri: str | None) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.client = MlflowClient(tracking_uri=uri)
        id_file = folder / MLFLOW_RUN_FILE
        if id_file.is_file():
            self.run_id = id_file.read_text().strip()
            self.client.update_run(self.run_id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(project)
        number = self.client.create_experiment(project) if experiment is None else experiment.experiment_id
        tags = {"ssr_rec.run_folder": str(folder.resolve())}
        self.run_id = self.client.create_run(number, run_name=folder.name, tags=tags).info.run_id
        write_text(id_file, f"{self.run_id}\n")

    def params(self, values: Mapping[str, Any]) -> None:
        """Log the config. MLflow takes a param once: what a resumed run changed becomes a tag, ``resumed.KEY``."""
        wanted = {_name(key): str(value)[:MOST_CHARACTERS] for key, value in values.items()}
        there = self.client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in wanted.items() if key not in there]
        changed = [RunTag(f"resumed.{key}", value) for key, value in wanted.items() if there.get(key, value) != value]
        for first in range(0, len(new), MOST_PARAMS):
            self.client.log_batch(self.run_id, params=new[first : first + MOST_PARAMS])
        self.client.log_batch(self.run_id, tags=changed)

    def metrics(self, row: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        found = [Metric(_name(name), float(value), now, row["step"]) for name, value in scalars(row).items()]
        self.client.log_batch(self.run_id, metrics=found)

    def artifacts(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self.client.log_artifact(self.run_id, str(path))

    def close(self, how: Ended) -> None:
        self.client.set_tag(self.run_id, ENDED_TAG, how)
        self.client.set_terminated(self.run_id, status=STATUS[how])


def _name(text: str) -> str:
    """Return a name with the characters alone that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", text, flags=re.ASCII)
