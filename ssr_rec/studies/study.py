"""Decides what a comparison runs: a study and the command line become systems, their trials and their seeds.

Every system gets the same budget of trials, each on the first ``search_seeds`` seeds. The trial with the best mean
validation figure is the system's winner and runs on the other seeds too. Test figures never reach the choice:
``best_trial`` does not see them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig, apply_override, resolve
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.schema import Schema
from ssr_rec.over_archs.ssr_settings import FILTER_KEYS, SSRConfig
from ssr_rec.runs.report import Measures, Report
from ssr_rec.studies.equal_terms import check_equal_terms
from ssr_rec.studies.nested import has, merge, put
from ssr_rec.studies.study_file import Study, slug
from ssr_rec.training.monitor import counted, monitored

OWN_KEYS = {"seed": "--seeds", "name": "--out", "runs": "--out", "data.path": "--data"}
"""Keys that differ between the runs of a comparison or are its own, and the option that sets them."""


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
    """Describes one point of a system's grid: what was drawn, and the run that it makes."""

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
        searched = {system: len(self.trial_seeds(system)) for system in self.trials}
        return sum(len(trials) * searched[name] + self.seeds - searched[name] for name, trials in self.trials.items())

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
                jobs += [job for job in self.final_jobs(system, reports) if job not in trials]
        order = list(self.trials)
        return sorted(jobs, key=lambda job: (job.seed, job.trial, order.index(job.system)))

    def trial_seeds(self, system: str) -> range:
        """Return the seeds that each trial runs on before one is chosen; a single trial needs no more than one."""
        return range(self.study.search_seeds if len(self.trials[system]) > 1 else 1)

    def trial_jobs(self, system: str) -> list[Job]:
        trials = range(len(self.trials[system]))
        return [Job(system, index, seed) for seed in self.trial_seeds(system) for index in trials]

    def judged(self, system: str, reports: Reports) -> dict[int, Measures]:
        """Return what the search goes by, of each trial that has finished on all its seeds: the mean over them."""
        found = {}
        for trial in range(len(self.trials[system])):
            jobs = [Job(system, trial, seed) for seed in self.trial_seeds(system)]
            if all(job in reports for job in jobs):
                found[trial] = _mean([reports[job].judged for job in jobs])
        return found

    def final_jobs(self, system: str, reports: Reports) -> list[Job]:
        """Return the S runs of the best of the system's finished trials; [] without any."""
        found = self.judged(system, reports)
        if not found:
            return []
        winner = best_trial(found, self.trials[system][0].config.train)
        return [Job(system, winner, seed) for seed in range(self.seeds)]


def _mean(measures: Sequence[Measures]) -> Measures:
    """Return the mean of each figure over the seeds, null where one has none."""

    def mean(task: str, name: str) -> float | None:
        values = [of_seed.get(task, {}).get(name) for of_seed in measures]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    return {task: {name: mean(task, name) for name in metrics} for task, metrics in measures[0].items()}


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
    if study.search_seeds > seeds:
        raise UserError(f"{where}: search_seeds={study.search_seeds} needs as many --seeds, or more; it is {seeds}")
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
    resolved = Study(trials=budget, search_seeds=study.search_seeds, systems=systems)
    return Plan(schema, resolved, planned, seeds)


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
