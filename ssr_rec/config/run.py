"""Composes the components' configs as ``RunConfig``: one YAML plus ``--a.b=c`` overrides."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import check_plain
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import parse_yaml, read_yaml
from ssr_rec.config.checkpointing import CheckpointConfig
from ssr_rec.config.data import DataConfig
from ssr_rec.config.dense import DenseConfig
from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.config.heads import HeadsConfig
from ssr_rec.config.optimizer import DenseOptimizerConfig
from ssr_rec.config.sequences import SequenceConfig
from ssr_rec.config.sharding import ShardingConfig
from ssr_rec.config.tracking import TrackConfig
from ssr_rec.config.training import TrainConfig
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.ssr_settings import SSRConfig

logger = logging.getLogger(__name__)
MAX_SIZE = 65_536
"""The widest, and the most of anything, that a model is built with."""


MAX_NAME_BYTES = 240
"""Of a run folder's name; file systems take 255, and a search appends to it."""


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise UserError("must be the name of one folder under runs, of printable characters and without a slash")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(f"must be at most {MAX_NAME_BYTES} bytes long, it has {len(name.encode())}")
    return name


RunName = Annotated[str, AfterValidator(_folder_name)]


class RunConfig(Settings):
    name: RunName | None = Field(None, description="run folder under runs; None: dataset, over-arch and time")
    runs: str = Field("runs", description="folder of run folders")
    seed: int = Field(0, ge=0, lt=2**32, description="of weights, shuffling and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    data: DataConfig = DataConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    sequences: dict[str, SequenceConfig] = Field(
        {}, description="sequence, or list feature -> encoder that makes fields of its events; others are pooled"
    )
    dense: DenseConfig = DenseConfig()
    over_arch: OverArchConfig = SSRConfig()
    heads: HeadsConfig = HeadsConfig()
    domain: str | None = Field(
        None,
        description="categorical feature of few values, by each of which metrics are given; heads.per_domain and "
        "over_arch.domain_views give each its own part of the model",
    )
    optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
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
    def _parts_of_a_domain(self) -> RunConfig:
        for key, wanted in self._domain_parts().items():
            if self.domain is None:
                raise UserError(f"{key}={str(wanted).lower()} needs domain, the column whose values it is for")
        return self

    def _domain_parts(self) -> dict[str, bool | int]:
        views: int = getattr(self.over_arch, "domain_views", 0)
        parts = {"heads.per_domain": self.heads.per_domain, "over_arch.domain_views": views}
        return {key: wanted for key, wanted in parts.items() if wanted}

    @property
    def domain_of_parts(self) -> str | None:
        """Return the domain whose values have parts of the model; None: there is none, or it is for metrics alone."""
        return self.domain if self._domain_parts() else None

    @property
    def metrics_by(self) -> str | None:
        """Return the column by whose values evaluations are given; None: they are not."""
        return self.train.metrics_by or self.domain

    @model_validator(mode="after")
    def _optimizer_of_something(self) -> RunConfig:
        if self.warm_start_optimizer and self.warm_start is None:
            raise UserError("warm_start_optimizer: true needs warm_start, the run or checkpoint to take it from")
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run of a YAML file (None: all defaults) with ``--a.b=c`` overrides; a later one wins.

    An override that names another over-arch than the file does drops the file's settings of its own, and a line on
    stderr says so.

    Raises:
        UserError: unreadable file, an override not of that form, an unknown key (the nearest valid one is named),
            or a value that its key does not take.
    """
    values = read_yaml(path, "a config file, such as one in configs/") if path is not None else {}
    chosen: dict[str, Any] = {}
    for override in overrides:
        apply_override(chosen, override)
    _drop_other_over_arch(values, chosen)
    for override in overrides:
        apply_override(values, override)
    return resolve(values, str(path or "config"))


def _drop_other_over_arch(values: dict[str, Any], chosen: Mapping[str, Any]) -> None:
    """Take out of a file's values what it sets of an over-arch that the command line replaces by another."""
    there, here = values.get("over_arch"), chosen.get("over_arch")
    if not isinstance(there, dict) or not isinstance(here, dict) or "name" not in here:
        return
    before = there.pop("name", SSRConfig().name)
    if before != here["name"] and there:
        logger.warning(
            "over_arch.name=%s: dropped the file's settings of %s: %s", here["name"], before, ", ".join(there)
        )
        there.clear()


def resolve(values: dict[str, Any], where: str) -> RunConfig:
    """Return the run of a mapping.

    Raises:
        UserError: an unknown key (the nearest valid one is named) or a bad value; ``where`` leads the message.
    """
    over_arch = values.get("over_arch")
    if isinstance(over_arch, dict):
        over_arch.setdefault("name", SSRConfig().name)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    _refuse_sizes(config.model_dump(include={"over_arch", "heads", "embeddings", "sequences", "dense"}), where)
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
            raise UserError(f"{where}: {key}={value} is more than {MAX_SIZE}, larger than any layer; lower it")


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML; ``load_config`` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put ``--a.b=c`` into a mapping.

    Raises:
        UserError: it is not of that form, or a section of it is a value.
    """
    # No section lies ten deep; an endless chain of them would break whoever prints or walks the mapping.
    match = re.fullmatch(r"--((?:\w+\.){0,9}\w+)=(.*)", override, flags=re.DOTALL)
    if match is None:
        raise UserError(f"argument {override[:80]!r} is not understood; overrides look like --train.batch_size=512")
    *sections, key = match[1].split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override[:80]!r}: {section!r} is a value, not a section")
    if takes_text([*sections, key]) and not _QUOTED.fullmatch(match[2]):
        values[key] = None if match[2] in ("null", "~", "") else match[2]
        try:
            check_plain(values[key])
        except ValueError as error:
            raise UserError(f"override {override[:80]!r}: {error}") from None
        return
    try:
        values[key] = parse_yaml(match[2])
    except ValueError as error:
        raise UserError(f"override {override[:80]!r}: the value is not YAML ({error}); quote it") from None


_QUOTED = re.compile(r"(?s)'.*'|\".*\"")
"""Text that is YAML, so that ``--name='"null"'`` can be said."""


def takes_text(path: Sequence[str]) -> bool:
    """Return whether a key is any text: a path, a name, whose `` #``, digits or dates are not YAML's to read."""
    model: Any = RunConfig
    for key in path:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or key not in model.model_fields:
            return False
        model = model.model_fields[key].annotation
    if get_origin(model) in (dict, list):
        return False
    # Of RunName | None, the arguments are str with its check and None.
    kinds = [get_args(kind)[0] if hasattr(kind, "__metadata__") else kind for kind in get_args(model) or (model,)]
    return str in kinds and set(kinds) <= {str, type(None)}


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
    """Return the keys valid in a section of ``model``; a section of an error's path may also be a union's tag."""
    for section in sections:
        if section in model.model_fields:
            models = _models(model.model_fields[section].annotation)
        else:
            # The key of a mapping of sections is neither.
            tagged = [t for t in models if "name" in t.model_fields and t.model_fields["name"].default == section]
            models = tagged or models
        model = models[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a key may hold, also those of a mapping or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
