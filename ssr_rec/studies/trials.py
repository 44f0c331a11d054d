"""Keeps the trials of a search in an Optuna study on disk, so that several processes share it and none is lost.

``study.db`` is SQLite, because a write to it is whole or not there, however the writer ends. Who works on a trial holds
the lock of its file in ``locks/``, which goes with the process and the trainings that it started. A running trial
without its lock is therefore a killed worker's, and the next free one goes on with it: same number, same run folder.
"""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig
from ssr_rec.config.same_run import flat_values
from ssr_rec.config.training import larger_is_better
from ssr_rec.studies.search_space import FloatRange, IntRange, PrunerSettings, Tuning, choices, point_of

if TYPE_CHECKING:
    import optuna

STUDY_FILE, LOCKS_FOLDER = "study.db", "locks"
STUDY_NAME = "tune"
SECONDS_FOR_A_LOCK = 60
"""How long SQLite waits for another process's write; all of ours take the folder's lock first."""


def import_optuna() -> Any:
    """Return the library, which an extra brings.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("ssr-rec tune needs Optuna: pip install 'ssr_rec[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass
class Taken:
    """Is a trial that this process works on.

    Attributes:
        point: key of the config -> value.
        lock: the open file whose lock says so.
        starts: trainings begun for it so far.
        reported: step of the last figure in the study; -1: none.
    """

    trial: optuna.trial.Trial
    point: dict[str, Any]
    lock: int
    starts: int
    reported: int

    @property
    def name(self) -> str:
        """Return the name of its run folder."""
        return f"{self.trial.number:04d}"


class TrialBook:
    """Gives trials to workers and takes in how they went.

    Args:
        out: the search's folder; made if it is not there.
        first: any run of the search, which says what is measured.
        dataset_id: of the data that all trials train on.

    Raises:
        UserError: Optuna is not installed, or the folder holds another search.
    """

    def __init__(self, out: Path, tuning: Tuning, first: RunConfig, dataset_id: str) -> None:
        self.optuna, self.out, self.tuning, self.train = import_optuna(), out, tuning, first.train
        (out / LOCKS_FOLDER).mkdir(parents=True, exist_ok=True)
        storage = self.optuna.storages.RDBStorage(
            f"sqlite:///{(out / STUDY_FILE).resolve()}",
            engine_kwargs={"connect_args": {"timeout": SECONDS_FOR_A_LOCK}},
        )
        self.maximizes = larger_is_better(self.train.monitor)
        with self._alone():
            self.study = self.optuna.create_study(
                storage=storage,
                study_name=STUDY_NAME,
                load_if_exists=True,
                direction="maximize" if self.maximizes else "minimize",
                sampler=self.optuna.samplers.RandomSampler(),
                pruner=self._pruner(tuning.pruner),
            )
            space = tuning.model_dump(mode="json", exclude={"trials"})
            self._check_same({"dataset_id": dataset_id, **flat_values(space)})

    def take(self) -> Taken | None:
        """Return the trial of a killed worker, else a new one; None when there is none for us now."""
        with self._alone():
            trials = self.trials()
            for frozen in trials:
                if frozen.state == self.optuna.trial.TrialState.RUNNING:
                    lock = self._lock(frozen.number)
                    if lock is not None:
                        return self._taken(self.optuna.trial.Trial(self.study, frozen._trial_id), lock)
            if len(trials) >= self.tuning.trials:
                return None
            self.study.sampler = self._sampler(len(trials))
            trial = self.study.ask()
            lock = self._lock(trial.number)
            assert lock is not None, "a new trial is nobody else's"
            return self._taken(trial, lock)

    def count_start(self, taken: Taken, by: int = 1) -> None:
        """Note that a training begins; with -1 that the last one does not count, as it was asked to stop."""
        taken.starts += by
        with self._alone():
            taken.trial.set_user_attr("starts", taken.starts)

    def report(self, taken: Taken, step: int, value: float) -> bool:
        """Note a figure of an evaluation and return whether the pruner wants the trial to end."""
        with self._alone():
            taken.trial.report(value, step)
            taken.reported = step
            return bool(taken.trial.should_prune())

    def end(self, taken: Taken, state: str, value: float | None = None, notes: Mapping[str, Any] | None = None) -> None:
        """Note how a trial ended: ``COMPLETE`` with its value, ``PRUNED`` or ``FAIL``; it is nobody's afterwards."""
        with self._alone():
            for key, note in (notes or {}).items():
                taken.trial.set_user_attr(key, note)
            self.study.tell(taken.trial.number, value, state=self.optuna.trial.TrialState[state])
        self.leave(taken)

    def leave(self, taken: Taken) -> None:
        """Leave a trial to whoever takes it next."""
        os.close(taken.lock)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Return all trials in the order of their numbers."""
        found: list[optuna.trial.FrozenTrial] = self.study.get_trials(deepcopy=False)
        return found

    def in_state(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.trials() if trial.state.name in states]

    def best(self) -> optuna.trial.FrozenTrial | None:
        """Return the complete trial with the best value, the earliest of equals."""
        complete = self.in_state("COMPLETE")
        sign = 1.0 if self.maximizes else -1.0
        return max(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def point(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        """Return key of the config -> value of a trial; {} of one whose worker was killed before all were drawn."""
        return point_of(self.tuning, trial.params) if set(trial.params) == set(self.tuning.search) else {}

    def _taken(self, trial: optuna.trial.Trial, lock: int) -> Taken:
        stored = {}
        for key, values in self.tuning.search.items():
            # What was drawn for this trial before comes back as it was.
            if isinstance(values, FloatRange):
                stored[key] = trial.suggest_float(key, values.low, values.high, log=values.log)
            elif isinstance(values, IntRange):
                stored[key] = trial.suggest_int(key, values.low, values.high, step=values.step, log=values.log)
            else:
                stored[key] = trial.suggest_categorical(key, choices(values))
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        reported = max(frozen.intermediate_values, default=-1)
        return Taken(trial, point_of(self.tuning, stored), lock, trial.user_attrs.get("starts", 0), reported)

    def _sampler(self, number: int) -> Any:
        """Return what draws trial ``number``, and seed it by that, so that no two processes draw the same."""
        settings, samplers = self.tuning.sampler, self.optuna.samplers
        seed = random.Random(f"{self.tuning.seed} {number}").getrandbits(32)
        if settings.name == "random":
            return samplers.RandomSampler(seed=seed)
        if settings.name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=settings.startup_trials)
        # constant_liar: what others are running counts as bad, so that workers look in different places.
        return samplers.TPESampler(
            seed=seed, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True
        )

    def _pruner(self, settings: PrunerSettings) -> Any:
        pruners = self.optuna.pruners
        if settings.name == "none":
            return pruners.NopPruner()
        if settings.name == "hyperband":
            return pruners.HyperbandPruner(min_resource=settings.min_steps, reduction_factor=settings.factor)
        return pruners.MedianPruner(n_startup_trials=settings.startup_trials, n_warmup_steps=settings.warmup_steps)

    def _check_same(self, wanted: Mapping[str, Any]) -> None:
        saved = self.study.user_attrs.get("space")
        if saved is None:
            self.study.set_user_attr("space", dict(wanted))
            return
        for key in sorted({*saved, *wanted}):
            if saved.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.out} is a search with {key}={saved.get(key)!r}, not {wanted.get(key)!r}; choose another "
                    "--out, or delete the folder"
                )

    def _lock(self, number: int) -> int | None:
        """Take the lock of a trial; None: somebody works on it."""
        lock = os.open(self.out / LOCKS_FOLDER / f"{number:04d}", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from taking trials and from writing the study."""
        lock = os.open(self.out / LOCKS_FOLDER / "all", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
