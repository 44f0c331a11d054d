"""Translates the estimator's parameters to the config of a run, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import RunConfig, resolve

PARAMETERS = {
    "embedding_dim": ("embeddings", "dim"),
    "epochs": ("train", "epochs"),
    "batch_size": ("train", "batch_size"),
    "learning_rate": ("optimizer", "learning_rate"),
}
"""Parameter -> its section and key in a config."""
LANES = 16
ANY_WIDTH = {"name": "ssr", "filter": "dynamic"}
"""The over-arch when none is named: SSR-D, as the views of SSR-S must not be wider than the input."""


def run_config(parameters: Mapping[str, Any], run: Path, data: Path) -> RunConfig:
    """Return the config of the estimator's run.

    Args:
        parameters: of the constructor.
        run: the run folder to be.
        data: the dataset to be.

    Raises:
        UserError: a key of ``config`` that has a parameter of its own or that the estimator sets, or a bad value.
    """
    values = copy.deepcopy(dict(parameters["config"] or {}))
    for section in {"data", "checkpoint", "embeddings", "optimizer", "train"} & set(values):
        if not isinstance(values[section], Mapping):
            raise UserError(f"config: {section} is {values[section]!r}; give a mapping of its keys")
    own = {"over_arch": "over_arch", "seed": "seed", "sequences": "encoders"}
    own |= {".".join(place): name for name, place in PARAMETERS.items()}
    for place, name in own.items():
        section, _, key = place.partition(".")
        if section in values and (not key or key in values[section]):
            raise UserError(f"config: {place} is the parameter {name} of CTRClassifier; give it there")
    for key in ("name", "runs", "resume"):
        if key in values:
            raise UserError(f"config: {key}: an estimator keeps its run itself; write it with to_run(path)")
    if "path" in values.get("data", {}):
        raise UserError("config: data.path: fit prepares the rows it is given; for a dataset there is train.py")
    batch_size = _plain(parameters["batch_size"])
    lanes = min(LANES, batch_size) if isinstance(batch_size, int) and batch_size > 0 else LANES
    # A notebook's run is not resumed, so it keeps its best weights alone; nor may it end the kernel when it stalls.
    defaults: dict[str, dict[str, Any]] = {
        "data": {"num_lanes": lanes},
        "checkpoint": {"every_minutes": None},
        "train": {"stall_timeout_s": None},
    }
    for section, inner in defaults.items():
        values[section] = {**inner, **values.get(section, {})}
    values["data"]["path"] = str(data)
    for name, (section, key) in PARAMETERS.items():
        values.setdefault(section, {})[key] = _plain(parameters[name])
    over_arch = parameters["over_arch"]
    values["over_arch"] = ANY_WIDTH if over_arch is None else _named(over_arch, "over_arch")
    encoders = parameters["encoders"] or {}
    values["sequences"] = {name: _sequence(one, f"encoders: {name}") for name, one in encoders.items()}
    values |= {"seed": _plain(parameters["seed"]), "name": run.name, "runs": str(run.parent)}
    return resolve(values, "CTRClassifier")


def parameters_of(config: RunConfig) -> dict[str, Any]:
    """Return the parameters under which an estimator would train as a run did."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    found = {name: getattr(getattr(config, section), key) for name, (section, key) in PARAMETERS.items()}
    for section, key in PARAMETERS.values():
        values.get(section, {}).pop(key, None)
    values.get("data", {}).pop("path", None)
    kept = {
        key: value
        for key, value in values.items()
        if value and key not in ("name", "runs", "resume", "seed", "over_arch", "sequences")
    }
    encoders = {
        name: {**one.encoder.model_dump(mode="json"), **({"target": one.target} if one.target else {})}
        for name, one in config.sequences.items()
    }
    over_arch = config.over_arch.model_dump(mode="json")
    return {
        **found,
        "over_arch": over_arch,
        "encoders": encoders or None,
        "seed": config.seed,
        "config": kept or None,
    }


def _named(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return dict(value)
    raise UserError(f"{what} is {value!r}; give a name, or a mapping of name and settings")


def _sequence(value: Any, what: str) -> dict[str, Any]:
    """Return a sequence's settings, whose target stands beside those of its encoder."""
    encoder = _named(value, what)
    return {"target": encoder.pop("target", None), "encoder": encoder}


def _plain(value: Any) -> Any:
    """Return a number of NumPy, as a grid of values may hold, as Python's."""
    return value.item() if isinstance(value, np.generic) else value
