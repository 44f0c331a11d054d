"""Decides what a comparison runs: a study file and the command line become systems, their trials and their seeds.

Every system gets the same budget of trials, each on seed 0. The trial with the best validation figure is the system's
winner and runs on the other seeds too. Test figures never reach the choice: ``best_trial`` does not see them.
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.config.run import RunConfig, apply_override, resolve
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.schema import Schema
from ssr_rec.over_archs.ssr_settings import FILTER_KEYS, SSRConfig
from ssr_rec.runs.report import Measures, Report
from ssr_rec.studies.equal_terms import check_equal_terms
from ssr_rec.studies.nested import has, merge, put
from ssr_rec.training.monitor import counted, monitored

OWN_KEYS = {"seed": "--seeds", "name": "--out", "runs": "--out", "data.path": "--data"}
"""Keys that differ between the runs of a comparison or are its own, and the option that sets them."""


def distinct(values: list[Any]) -> list[Any]:
    if any(value in values[:index] for index, value in enumerate(values)):
        raise UserError(f"a value is listed twice: {values}; every trial must be another run")
    return values


Search = dict[str, Annotated[list[Any], Field(min_length=1), AfterValidator(distinct)]]


class System(Settings):
    baseline: bool = Field(True, description="one of those the others are tested against")
    curve: str | None = Field(None, description="systems of one curve are joined by a line in the figure")
    base: dict[str, Any] = Field({}, description="a partial RunConfig, over that of the study")
    search: Search = Field({}, description="key -> values to try; over the study's list of the same key")


class Study(Settings):
    """Holds what a study file says."""

    trials: int = Field(1, ge=1, description="search budget of every system; 1: the first value of every list")
    base: dict[str, Any] = Field({}, description="a partial RunConfig that all systems share")
    search: Search = Field({}, description="key -> values to try, such as embeddings.weight_decay: [0, 1e-6]")
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="name -> a partial RunConfig over each system's, such as another encoder; every system has all"
    )
    systems: dict[str, System] = Field(min_length=1, description="by the name that tables and figures show")

    def crossed(self) -> Study:
        """Return the study with a system ``name, variant`` for each of both, and no variants."""
        if not self.variants:
            return self
        systems: dict[str, System] = {}
        for (name, system), (variant, settings) in product(self.systems.items(), self.variants.items()):
            base = copy.deepcopy(system.base)
            merge(base, settings)
            systems[f"{name}, {variant}"] = system.model_copy(update={"base": base})
        return self.model_copy(update={"systems": systems, "variants": {}})


class Job(NamedTuple):
    """Names one training run of a comparison."""

    system: str
    trial: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its run folder."""
        return f"{slug(self.system)}-t{self.trial}-s{self.seed}"


Reports = Mapping[Job, Report]


@dataclass(frozen=True)
class Trial:
    """Describes one point of a system's grid: what was drawn, and the run that it makes on seed 0."""

    settings: dict[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Plan:
    """Lists all a comparison may run.

    Attributes:
        study: the systems chosen, each with a base of its own that has everything resolved and the search that is left
            of it; as a study file it makes these runs again.
        trials: name -> its trials, the first values of every list in front.
        seeds: runs of each winner, S.
    """

    schema: Schema
    study: Study
    trials: dict[str, list[Trial]]
    seeds: int

    def all_jobs(self) -> Iterator[Job]:
        """Yield every run there can be, whatever wins."""
        for system, trials in self.trials.items():
            for index in range(len(trials)):
                yield from (Job(system, index, seed) for seed in range(self.seeds))

    def num_jobs(self) -> int:
        """Return runs of the finished comparison."""
        return sum(len(trials) + self.seeds - 1 for trials in self.trials.values())

    def config(self, job: Job, runs: Path) -> RunConfig:
        """Return the run of a job, in ``runs/<name of the job>``.

        A static filter's dims are drawn anew for each seed: whatever a spread over seeds is of, the draw is part of it.
        """
        config = self.trials[job.system][job.trial].config
        own: dict[str, Any] = {"name": job.name, "runs": str(runs), "seed": job.seed}
        over_arch = config.over_arch
        if isinstance(over_arch, SSRConfig) and "index_seed" in FILTER_KEYS[over_arch.filter]:
            own["over_arch"] = over_arch.model_copy(update={"index_seed": over_arch.index_seed + job.seed})
        return config.model_copy(update=own)

    def wanted(self, reports: Reports, failed: Collection[Job] = ()) -> list[Job]:
        """Return every run known to be needed so far, in the order to run them: seed by seed, trial by trial.

        The other seeds of a system are known once each of its trials has a report or has failed.
        """
        jobs = []
        for system in self.trials:
            trials = self.trial_jobs(system)
            jobs += trials
            if all(job in reports or job in failed for job in trials):
                jobs += self.final_jobs(system, reports)[1:]
        order = list(self.trials)
        return sorted(jobs, key=lambda job: (job.seed, job.trial, order.index(job.system)))

    def trial_jobs(self, system: str) -> list[Job]:
        return [Job(system, index, 0) for index in range(len(self.trials[system]))]

    def final_jobs(self, system: str, reports: Reports) -> list[Job]:
        """Return the S runs of the best of the system's finished trials; [] without any."""
        found = {job.trial: reports[job].judged for job in self.trial_jobs(system) if job in reports}
        if not found:
            return []
        winner = best_trial(found, self.trials[system][0].config.train)
        return [Job(system, winner, seed) for seed in range(self.seeds)]


def best_trial(validation: Mapping[int, Measures], config: TrainConfig) -> int:
    """Return the trial with the best ``train.monitor`` on validation, the earliest of equals.

    Args:
        validation: trial -> label -> metric -> value, null where it is not defined.
    """

    # A label that no trial has a figure for is one of the fold; one that a trial lacks is a failure of that trial.
    everywhere = {
        task
        for tasks in validation.values()
        for task, metrics in tasks.items()
        if (value := metrics.get(config.monitor)) is not None and not math.isnan(value)
    }

    def figure(trial: int) -> float:
        tasks = {
            task: {name: math.nan if value is None else value for name, value in metrics.items()}
            for task, metrics in validation[trial].items()
        }
        failed = any(task in everywhere and math.isnan(tasks[task][config.monitor]) for task in counted(tasks, config))
        return -math.inf if failed else monitored(tasks, config)

    return max(sorted(validation), key=figure)


def read_study(path: str | Path) -> Study:
    """Return the study of a YAML file, its variants crossed with its systems.

    Raises:
        UserError: unreadable, not YAML, an unknown key or a wrong value; the message names file and key.
    """
    values = read_yaml(path, "a study, such as configs/compare/systems.yaml")
    try:
        return Study.model_validate(values).crossed()
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


def make_plan(
    study: Study,
    schema: Schema,
    data: str,
    seeds: int,
    *,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    where: str | Path = "study",
) -> Plan:
    """Return every run of a comparison, checked before the first one starts.

    Args:
        data: the prepared dataset's folder, as the runs will name it.
        trials: budget instead of the study's.
        overrides: ``--a.b=c``, stronger than the study; a key given so is not searched.
        where: the study's file, for messages.

    Raises:
        UserError: names the file, the system and the key.
    """
    budget = trials or study.trials
    systems, planned = {}, {}
    for name, system in study.systems.items():
        place = f"{where}: system {name!r}"
        search = {key: values for key, values in {**study.search, **system.search}.items() if is_free(key, overrides)}
        planned[name] = [
            Trial(settings, resolve_point(place, [study.base, system.base], settings, overrides, data))
            for settings in draw_trials(name, search, budget)
        ]
        for trial in planned[name]:
            check_with_data(place, trial.config, schema)
        systems[name] = system.model_copy(update={"base": _shareable(planned[name][0].config), "search": search})
    configs = {name: [trial.config for trial in trials] for name, trials in planned.items()}
    check_equal_terms(configs, schema, where)
    return Plan(schema, Study(trials=budget, systems=systems), planned, seeds)


def draw_trials(system: str, search: Mapping[str, Sequence[Any]], budget: int) -> list[dict[str, Any]]:
    """Return ``budget`` different points of the grid, or all: first values first, the others drawn by the name.

    A larger budget only adds points at the end; other systems do not matter.
    """
    size = math.prod(len(values) for values in search.values())
    rng = random.Random(system)
    drawn = [0]
    while len(drawn) < min(budget, size):
        point = rng.randrange(size)
        if point not in drawn:
            drawn.append(point)
    return [_point(search, index) for index in drawn]


def slug(name: str) -> str:
    """Return a name as part of a folder's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def choose(study: Study, over_archs: Sequence[str], where: str | Path = "study") -> Study:
    """Return the study with some of its systems, by name, or with ``all``.

    Raises:
        UserError: a system of the study has no name for a folder, or there is none of a name.
    """
    slugs: dict[str, str] = {}
    for name in study.systems:
        if not slug(name) or slug(name) in slugs:
            raise UserError(f"{where}: system {name!r} makes no run folder of its own; give it another name")
        slugs[slug(name)] = name
    if list(over_archs) == ["all"]:
        return study
    unknown = [name for name in over_archs if slug(name) not in slugs]
    if unknown:
        raise UserError(f"--over-archs: {where} has no system {unknown[0]!r}; it has {', '.join(study.systems)}")
    wanted = {slug(name) for name in over_archs}
    systems = {name: study.systems[name] for key, name in slugs.items() if key in wanted}
    return study.model_copy(update={"systems": systems})


def is_free(key: str, overrides: Sequence[str]) -> bool:
    """Return whether no override sets ``key``, a section around it or a key in it."""
    given = [override.removeprefix("--").split("=")[0] for override in overrides]
    return not any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in given)


def _shareable(config: RunConfig) -> dict[str, Any]:
    """Return a config as the base of a study: without the keys that no study sets."""
    values = config.model_dump(mode="json")
    for key in OWN_KEYS:
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        del inner[last]
    return values


def _point(search: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """Return point number ``index`` of the grid; 0 has the first value of every list."""
    settings = {}
    for key, values in search.items():
        index, position = divmod(index, len(values))
        settings[key] = values[position]
    return settings


def resolve_point(
    where: str,
    bases: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    data: str,
    own: Mapping[str, str] = OWN_KEYS,
) -> RunConfig:
    """Return the run of a point of a search: bases, the point, the overrides, the later the stronger.

    Args:
        own: key that is not the file's to set -> the option that sets it.

    Raises:
        UserError: one of those keys, or a run that is refused.
    """
    values: dict[str, Any] = {}
    for base in bases:
        merge(values, base)
    for key, value in settings.items():
        put(where, values, key, value)
    for override in overrides:
        apply_override(values, override)
    for key, option in own.items():
        if has(values, key):
            raise UserError(f"{where}: {key} is not the study's to set; use {option}")
    put(where, values, "data.path", data)
    return resolve(values, f"{where} with {settings}" if settings else where)


def check_with_data(where: str, config: RunConfig, schema: Schema) -> None:
    """Refuse what a run would refuse as soon as it reads the dataset."""
    # Imported here: it starts the whole training stack, which reading a study does not need.
    from ssr_rec.training.setup import check_train_config

    try:
        check_train_config(config.train, schema.select(config.data.features, config.data.labels))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
