"""Plans runs that others published, fits the constants of a step to them, and says how far off held-out ones are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from scipy.optimize import least_squares

from ssr_rec.common.settings import Settings
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.config.run import load_config
from ssr_rec.data.features import Drawn, Feature
from ssr_rec.data.schema import Schema
from ssr_rec.planning.cases import Case, make_world
from ssr_rec.planning.dlrm import DIM, dlrm_cost
from ssr_rec.planning.estimate import host_time, step_time
from ssr_rec.planning.hardware import Assumptions, load_hardware
from ssr_rec.planning.remedies import Planned, plan_case

FILE = Path(__file__).parent / "published_runs.yaml"
LOADER_NS = {"none": 0.0, "copies": 3.0, "shuffles": 9.5}
"""Nanoseconds an id: those runs make batches in the training thread; ours has a reader's. Measured by repeating what
TorchRec's reader of Criteo does on an AMD EPYC: transpose and pin, and with --shuffle_batches permute the rows."""
PRIORS = {"host_step_ms": 4.0, "host_way_ms": 3.0, "serial_share": 0.25, "fp32": 0.8}
"""The constants that are fitted and what they are taken for before: the last is the share of fp32's peak."""
PRIOR_SIGMA, RUN_SIGMA = 0.5, 0.2
"""Spread, in logarithms, of those guesses, and of runs round a right model: two stacks' same run differ by 1.39."""


class PublishedRun(Settings):
    """Describes one line of a published table."""

    source: str
    hardware: str = "aws_p4d"
    nodes: int = Field(1, ge=1)
    gpus: int = Field(ge=1, description="of a node")
    rows: int = Field(ge=1, description="of a GPU's batch")
    tables: str
    multi_hot: bool = False
    optimizer: Literal["sgd", "adagrad"]
    interaction: Literal["dot", "dcn"] = "dot"
    tf32: bool = False
    loader: Literal["none", "copies", "shuffles"] = Field(description="what the training thread does for a batch")
    calibrates: bool = Field(True, description="false: the constants are never fitted to it")
    samples_per_s: float = Field(gt=0)

    @property
    def name(self) -> str:
        types = "TF32" if self.tf32 else "fp32"
        world = f"{self.nodes}x{self.gpus}" if self.nodes > 1 else str(self.gpus)
        return f"{world}x{self.rows} {self.interaction} {self.optimizer} {types}"


class PublishedRuns(Settings):
    """Lists published runs, with the rows of their tables and where they stand."""

    tables: dict[str, list[int]]
    multi_hot: list[float]
    sources: dict[str, str]
    runs: list[PublishedRun]


@dataclass(frozen=True)
class PlannedRun:
    """Holds a published run with the plan of its tables; what a step takes follows from the constants."""

    run: PublishedRun
    planned: Planned

    def samples_per_s(self, assumed: Assumptions) -> float:
        """Return what the planner says under those constants."""
        step = step_time(self._under(assumed), self.planned.dense, self.planned.estimate.time, self.host_ms(assumed))
        return self.planned.case.config.train.batch_size / step.total * 1000

    def host_ms(self, assumed: Assumptions) -> float:
        """Return the host's milliseconds of a step, those for making the batch included."""
        return host_time(self._under(assumed), self.planned.found.options, self.planned.dense) + self._loader_ms

    def _under(self, assumed: Assumptions) -> Case:
        case, hardware = self.planned.case, self.planned.case.world.hardware
        own = assumed.model_copy(update={"host_speed": hardware.assumptions.host_speed})
        return replace(case, world=replace(case.world, hardware=hardware.model_copy(update={"assumptions": own})))

    @cached_property
    def _loader_ms(self) -> float:
        return sum(self.planned.case.lengths.values()) * self.run.rows * LOADER_NS[self.run.loader] / 1e6


def read_runs() -> PublishedRuns:
    return PublishedRuns.model_validate(read_yaml(FILE, "the published runs of the package"))


def plan_runs(published: PublishedRuns) -> list[PlannedRun]:
    """Plan every run's tables on its hardware."""
    return [PlannedRun(run, plan_run(published, run)) for run in published.runs]


def plan_run(published: PublishedRuns, run: PublishedRun) -> Planned:
    rows = published.tables[run.tables]
    lengths = published.multi_hot if run.multi_hot else [1.0] * len(rows)
    kind: Literal["list", "categorical"] = "list" if run.multi_hot else "categorical"
    features = [
        Feature(
            name=f"cat_{i}",
            kind=kind,
            num_embeddings=count,
            encoding=Drawn(column=f"cat_{i}"),
            max_length=int(length) if run.multi_hot else None,
        )
        for i, (count, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    schema = Schema(name=run.name, dataset_id="", features=features, labels=["click"], splits={})
    overrides = [
        f"--embeddings.dim={DIM}",
        f"--embeddings.optimizer={run.optimizer}",
        f"--train.batch_size={run.nodes * run.gpus * run.rows}",
        f"--train.tf32={str(run.tf32).lower()}",
    ]
    if run.nodes * run.gpus == 1:
        # 91 GiB of tables: the only way to have them on one GPU.
        overrides.append("--sharding.kernels=[fused,fused_uvm_caching]")
    named = {f"cat_{i}": length for i, length in enumerate(lengths)}
    case = Case(
        load_config(None, overrides), schema, named, make_world(run.nodes, run.gpus, load_hardware(run.hardware))
    )
    return plan_case(case, dlrm_cost(len(rows), run.interaction, run.optimizer))


def fit(runs: Sequence[PlannedRun]) -> Assumptions:
    """Return the constants, most likely a posteriori, for these runs: logarithms of ratios, priors as above."""
    prior, base = np.log(list(PRIORS.values())), Assumptions()

    def residuals(logs: np.ndarray) -> np.ndarray:
        assumed = _assumed(base, logs)
        off = [math.log(run.samples_per_s(assumed) / run.run.samples_per_s) / RUN_SIGMA for run in runs]
        return np.concatenate([off, (logs - prior) / PRIOR_SIGMA])

    return _assumed(base, least_squares(residuals, prior).x)


def fitted(assumed: Assumptions) -> dict[str, float]:
    """Return the constants that are fitted, of ``PRIORS``' names."""
    values = {**assumed.model_dump(), "fp32": assumed.gemm_utilisation.fp32}
    return {name: values[name] for name in PRIORS}


def held_out(runs: Sequence[PlannedRun]) -> list[float]:
    """Return each run's predicted over published samples/s, with the constants fitted to all the others."""
    return [
        run.samples_per_s(fit([other for other in runs if other is not run and other.run.calibrates]))
        / run.run.samples_per_s
        for run in runs
    ]


def _assumed(base: Assumptions, logs: np.ndarray) -> Assumptions:
    values = dict(zip(PRIORS, np.exp(logs).tolist(), strict=True))
    fp32, share = min(values.pop("fp32"), 0.95), min(values.pop("serial_share"), 1.0)
    rates = base.gemm_utilisation.model_copy(update={"fp32": fp32})
    return base.model_copy(update={**values, "serial_share": share, "gemm_utilisation": rates})
