"""Reads a study file: what ``tools/compare.py`` compares, before a dataset and a command line make runs of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.studies.nested import merge


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
    search_seeds: int = Field(1, ge=1, description="seeds of each trial; the mean over them decides")
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
