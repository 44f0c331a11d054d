"""Defines what ``ssr-rec tune`` reads: a search space over the keys of a run's config, and how to look through it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.config.run import RunConfig, apply_override
from ssr_rec.data.schema import Schema
from ssr_rec.studies.equal_terms import LENGTHS, judging_tasks
from ssr_rec.studies.study import check_with_data, is_free, resolve_point
from ssr_rec.studies.study_file import distinct

OWN_KEYS = {"name": "--out", "runs": "--out", "data.path": "--data", "resume": "the same --out again, which goes on"}
"""Keys that differ between trials or are the search's own, and what sets them."""
JUDGES = ("seed", "train.monitor", "train.monitor_task", "data.labels", "data.days")
"""Keys that decide what the objective measures, so that trials must share them."""


class FloatRange(Settings):
    type: Literal["float"]
    low: float
    high: float
    log: bool = Field(False, description="draw the logarithm evenly; low must be above 0")

    @model_validator(mode="after")
    def _is_a_range(self) -> FloatRange:
        _check_range(self.low, self.high, self.log)
        return self

    def ends(self) -> list[Any]:
        """Return the values to check before any run."""
        return [self.low, self.high]


class IntRange(Settings):
    type: Literal["int"]
    low: int
    high: int
    log: bool = Field(False, description="draw the logarithm evenly; low must be above 0")
    step: int = Field(1, ge=1, description="distance of the values, from low on")

    @model_validator(mode="after")
    def _is_a_range(self) -> IntRange:
        _check_range(self.low, self.high, self.log)
        if self.log and self.step > 1:
            raise UserError("log and step exclude each other; leave one out")
        if (self.high - self.low) % self.step:
            raise UserError(f"no step of {self.step} from low={self.low} ends at high={self.high}; change one of them")
        return self

    def ends(self) -> list[Any]:
        """Return the values to check before any run."""
        return [self.low, self.high]


def _check_range(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise UserError(f"low={low} is not below high={high}; give a list of values to try single ones")
    if log and low <= 0:
        raise UserError(f"log needs low above 0, not {low}")


def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return "values"
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return kind if kind in ("float", "int") else None


Values = Annotated[list[Any], Field(min_length=2), AfterValidator(distinct)]
Range = Annotated[
    Annotated[Values, Tag("values")] | Annotated[FloatRange, Tag("float")] | Annotated[IntRange, Tag("int")],
    Discriminator(
        _kind,
        custom_error_type="range",
        custom_error_message="must be a list of values, or {type: float, low: .., high: .., log: true}, or of type int",
    ),
]


class SamplerSettings(Settings):
    name: Literal["tpe", "gp", "random"] = Field(
        "tpe", description="tree-structured Parzen estimator, Gaussian process, or evenly at random"
    )
    startup_trials: int = Field(10, ge=1, description="trials drawn at random before tpe or gp learn from them")


class PrunerSettings(Settings):
    name: Literal["median", "hyperband", "none"] = Field(
        "median", description="median: end a trial that is behind the median of the others at the same step"
    )
    startup_trials: int = Field(5, ge=0, description="of median: trials that must have ended before one is pruned")
    warmup_steps: int = Field(0, ge=0, description="of median: training steps in which no trial is pruned")
    min_steps: int = Field(1, ge=1, description="of hyperband: training steps that the shortest trials get")
    factor: int = Field(3, ge=2, description="of hyperband: one of so many trials goes on to the next rung")


class Tuning(Settings):
    """Holds what a search file says. The objective is the run's own: ``train.monitor`` of ``train.monitor_task``."""

    trials: int = Field(20, ge=1, description="runs in all, pruned and failed ones included")
    seed: int = Field(0, ge=0, description="of the draws")
    sampler: SamplerSettings = SamplerSettings()
    pruner: PrunerSettings = PrunerSettings()
    base: dict[str, Any] = Field({}, description="a partial RunConfig that all trials share")
    search: dict[str, Range] = Field(
        min_length=1, description="key -> list of values, or range; later keys over earlier"
    )


def read_tuning(path: str | Path, overrides: Sequence[str] = ()) -> Tuning:
    """Return the search of a YAML file.

    Args:
        overrides: ``--a.b=c`` over the file's base; a key given so is not searched.

    Raises:
        UserError: unreadable, not YAML, an unknown key or a wrong value; the message names file and key.
    """
    try:
        tuning = Tuning.model_validate(read_yaml(path, "a search, such as configs/tune/kuairand.yaml"))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    base: dict[str, Any] = copy.deepcopy(tuning.base)
    for override in overrides:
        apply_override(base, override)
    search = {key: values for key, values in tuning.search.items() if is_free(key, overrides)}
    if not search:
        raise UserError(f"{path}: the command line sets every key of search; nothing is left to look for")
    return tuning.model_copy(update={"base": base, "search": search})


def config_of(tuning: Tuning, point: Mapping[str, Any], data: str, where: str | Path) -> RunConfig:
    """Return the run of a point of the space.

    Raises:
        UserError: the point makes no run; the message names file and key.
    """
    return resolve_point(str(where), [tuning.base], point, [], data, OWN_KEYS)


def check_tuning(tuning: Tuning, schema: Schema, data: str, where: str | Path) -> RunConfig:
    """Refuse what no trial could run, before the first: every value of a list and both ends of every range.

    Returns:
        the run of the first values, which decides what is measured.

    Raises:
        UserError: names file and key.
    """
    for key in tuning.search:
        if any(f"{other}.".startswith(f"{key}.") for other in (*OWN_KEYS, *JUDGES)):
            raise UserError(f"{where}: search: {key} decides what is measured, or where; set it once for all trials")
    first = {key: _checked(values)[0] for key, values in tuning.search.items()}
    judge = config_of(tuning, first, data, where)
    for key, values in tuning.search.items():
        for value in _checked(values):
            config = config_of(tuning, {**first, key: value}, data, where)
            if judging_tasks(config, schema) != judging_tasks(judge, schema):
                raise UserError(
                    f"{where}: search: {key} changes over which tasks {judge.train.monitor} is a mean; set "
                    "train.monitor_task for all trials"
                )
            if config.data.days is not None and config.train.max_steps is not None and key in LENGTHS:
                raise UserError(
                    f"{where}: search: {key} changes on which day train.max_steps={config.train.max_steps} ends, and "
                    "trials must be judged by the same days; set train.max_steps to null, or search other keys"
                )
            check_with_data(str(where), config, schema)
    return judge


def _checked(values: Range) -> list[Any]:
    return values if isinstance(values, list) else values.ends()


def choices(values: Sequence[Any]) -> list[Any]:
    """Return a list's values as Optuna stores them: numbers and text as they are, lists and mappings as JSON."""
    return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]


def point_of(tuning: Tuning, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return key -> value of a trial's parameters as Optuna stores them, in the order of the file."""
    point = {}
    for key, values in tuning.search.items():
        point[key] = values[choices(values).index(stored[key])] if isinstance(values, list) else stored[key]
    return point
