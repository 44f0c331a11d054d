"""RunConfig: composes the components' configs; one YAML plus ``--a.b=c`` overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ssr_rec.data.synthetic import SyntheticConfig
from ssr_rec.embeddings import EmbeddingsConfig
from ssr_rec.model import HeadsConfig
from ssr_rec.optim import DenseOptimizerConfig
from ssr_rec.over_archs import OverArchConfig, SSRConfig
from ssr_rec.saver import CheckpointConfig
from ssr_rec.schema import first_problem
from ssr_rec.settings import Settings
from ssr_rec.sharding import ShardingConfig
from ssr_rec.trainer import TrainConfig
from ssr_rec.yaml_file import parse_yaml, read_yaml

MAX_SIZE = 65_536
"""The widest, and the most of anything, that a model is built with."""


class DataConfig(Settings):
    path: str | None = Field(None, description="a folder made by tools/prepare_data.py; None: draw the synthetic log")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="the log to draw when path is None")
    synthetic_root: str = Field("data", description="folder that keeps drawn logs")
    features: list[str] | None = Field(None, description="features to use, in this order; None: all")
    labels: list[str] | None = Field(None, description="labels to train, one task each; None: all")
    days: str | None = Field(
        None,
        description="train by days, evaluating each next one before it is trained on: all, FIRST..LAST, FIRST.. or "
        "..LAST; train.epochs are then passes over each day",
    )
    num_lanes: int = Field(
        16, ge=1, le=65_536, description="lanes of data/lanes.py: up to so many ranks see equal batches"
    )
    shuffle: bool = Field(True, description="new order every epoch; false reads the rows as they are stored")
    prefetch: int = Field(4, ge=1, description="batches read ahead in the background")


class RunConfig(Settings):
    name: str | None = Field(None, description="run folder under runs; None: dataset, over-arch and time")
    runs: str = Field("runs", description="folder of run folders")
    seed: int = Field(0, ge=0, lt=2**32, description="of weights, shuffling and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    data: DataConfig = DataConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    over_arch: OverArchConfig = SSRConfig()
    heads: HeadsConfig = HeadsConfig()
    optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: str = Field(
        "auto",
        description="auto: go on with the unfinished run of this name, or of this launcher job; never: begin; "
        "PATH of a run folder or a training checkpoint: go on from there in a new run folder",
    )
    warm_start: str | None = Field(
        None, description="run folder or checkpoint whose weights to begin with; tables may have grown since"
    )
    warm_start_optimizer: bool = Field(
        False, description="begin with its optimizer's state as well; of a run folder, take the latest checkpoint"
    )

    @model_validator(mode="after")
    def _optimizer_of_something(self) -> RunConfig:
        if self.warm_start_optimizer and self.warm_start is None:
            raise ValueError("warm_start_optimizer: true needs warm_start, the run or checkpoint to take it from")
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file (None: all defaults) with ``--a.b=c`` overrides, the later the stronger.

    Raises:
        ValueError: unreadable file, an override not of that form, an unknown key (the nearest valid one is named),
            or a value that its key does not take.
    """
    values = read_yaml(path, "a config file, such as one in configs/") if path is not None else {}
    for override in overrides:
        apply_override(values, override)
    return resolve(values, str(path or "config"))


def resolve(values: dict[str, Any], where: str) -> RunConfig:
    """The run of a mapping.

    Raises:
        ValueError: an unknown key (the nearest valid one is named) or a bad value; ``where`` leads the message.
    """
    over_arch = values.get("over_arch")
    if isinstance(over_arch, dict):
        over_arch.setdefault("name", SSRConfig().name)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error)}") from None
    _refuse_sizes(config.model_dump(include={"over_arch", "heads", "embeddings"}), where)
    return config


def _refuse_sizes(settings: dict[str, Any], where: str) -> None:
    """Refuse a size no layer has, before something of that size is begun."""
    left = list(settings.items())
    while left:
        key, value = left.pop()
        if isinstance(value, (list, dict)):
            left += [
                (f"{key}.{at}", item) for at, item in (value.items() if isinstance(value, dict) else enumerate(value))
            ]
        elif isinstance(value, int) and value > MAX_SIZE and not key.endswith(("seed", ".rows")):
            raise ValueError(f"{where}: {key}={value} is more than {MAX_SIZE}, larger than any layer; lower it")


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; ``load_config`` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put ``--a.b=c`` into a mapping.

    Raises:
        ValueError: it is not of that form, or a section of it is a value.
    """
    # No section lies ten deep; an endless chain of them would break whoever prints or walks the mapping.
    match = re.fullmatch(r"--((?:\w+\.){0,9}\w+)=(.*)", override, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"argument {override[:80]!r} is not understood; overrides look like --train.batch_size=512")
    *sections, key = match[1].split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override[:80]!r}: {section!r} is a value, not a section")
    try:
        values[key] = parse_yaml(match[2])
    except ValueError as error:
        raise ValueError(f"override {override[:80]!r}: the value is not YAML ({error}); quote it") from None


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden":
        return first_problem(error)
    *sections, key = [str(part) for part in problem["loc"]]
    valid = _keys(RunConfig, sections)
    nearest = difflib.get_close_matches(key, valid, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(valid)}"
    return f"unknown key {'.'.join([*sections, key])!r}; {hint}"


def _keys(model: type[BaseModel], sections: list[str]) -> list[str]:
    """The keys valid in a section of ``model``; a section of an error's path may also be a union's tag."""
    for section in sections:
        if section in model.model_fields:
            inner = model.model_fields[section].annotation
            models = [t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel)]
        else:
            # The key of a mapping of sections is neither.
            tagged = [t for t in models if "name" in t.model_fields and t.model_fields["name"].default == section]
            models = tagged or models
        model = models[0]
    return list(model.model_fields)
