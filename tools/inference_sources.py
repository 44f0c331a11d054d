"""Makes the cases of bench_inference.py from its command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from inference_cases import Case, untrained
from over_arch_sizes import COSTS, SIZE_KEYS, parse_over_arch, resize

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import place
from ssr_rec.config.run import RunConfig, load_config, resolve
from ssr_rec.data.schema import Schema
from ssr_rec.data.synthetic.write import ensure_synthetic
from ssr_rec.model.build import build_dense
from ssr_rec.over_archs.base import OverArch, equal_dim
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.serving.export import Compared, Form, export_restored
from ssr_rec.serving.quantized_tables import Precision
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import Restored, restore_model

TABLES: tuple[str, ...] = get_args(Precision)
DENSE = ("fp32", "bf16")
PARITY_ROWS = 2_000
"""Of the test fold, that an artifact is compared on with the eager model before it is measured."""
MATCHES = {"params": "parameters", "flops": "flops"}
"""What --match calls the costs of over_arch_sizes."""
MULTIPLE = 8


@dataclass(frozen=True)
class Source:
    """Describes one model to measure: a run, an artifact, or a config with its dataset's schema."""

    kind: Literal["run", "artifact", "config"]
    model: str
    schema: Schema
    path: Path
    data: Path | None
    config: RunConfig | None
    sizes: dict[str, int | None]


def match_of(text: str | None) -> tuple[str, float] | None:
    """Return ``params=1e6`` as a key of COSTS and its value.

    Raises:
        ValueError: not of that form.
    """
    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        target = float(value)
    except ValueError:
        target = math.nan
    if name not in MATCHES or not 0 < target < math.inf:
        raise UserError(f"--match {text}: must be {' or '.join(MATCHES)}, = and a positive number, such as params=1e6")
    return MATCHES[name], target


def read_sources(options: argparse.Namespace, match: tuple[str, float] | None) -> list[Source]:
    """Runs, artifacts and configs in that order, with names that tell them apart.

    Raises:
        ValueError: one that cannot be read, or an over-arch that cannot be built or matched.
    """
    sources = [_run(path, options.data) for path in options.run]
    sources += [_artifact(path, options.data) for path in options.artifact]
    for path in options.config:
        config = load_config(path)
        schema, _ = dataset(config)
        specs: Sequence[str | None] = options.over_archs or [None]
        for spec in specs:
            over_arch = config.over_arch if spec is None else parse_over_arch(spec)
            if match is not None:
                over_arch = matched(over_arch, config, schema, *match, multiple=options.multiple or MULTIPLE)
            own = config.model_copy(update={"over_arch": over_arch})
            sources.append(Source("config", over_arch.label, schema, path, options.data, own, sizes_of(own, schema)))
    names = [source.model for source in sources]
    return [
        source if names.count(source.model) == 1 else replace(source, model=f"{source.model} {source.path.name}")
        for source in sources
    ]


def dataset(config: RunConfig) -> tuple[Schema, Path]:
    """Return the dataset of a config and its folder; the synthetic log is drawn if it is not there."""
    folder = place(config.data.path or ensure_synthetic(config.data.synthetic, Path(config.data.synthetic_root)))
    return Schema.read(folder).select(config.data.features, config.data.labels), folder


def matched(
    over_arch: OverArchConfig, config: RunConfig, schema: Schema, cost: str, target: float, multiple: int
) -> OverArchConfig:
    """Return the over-arch with the size that costs nearest to the target; says what it reached.

    Raises:
        ValueError: no size comes near, or the fields differ in dim.
    """
    own = build_over_arch(config.model_copy(update={"over_arch": over_arch}), schema)
    dim = equal_dim(own, "--match")
    found = resize(over_arch, cost, target, len(schema.features), dim, multiple)
    reached = build_over_arch(config.model_copy(update={"over_arch": found}), schema)
    value, size = getattr(reached, COSTS[cost]), SIZE_KEYS[found.name]
    print(f"{found.label}: {size}={getattr(found, size)} has {value:,} {cost}, {value / target - 1:+.1%}")
    return found


def build_over_arch(config: RunConfig, schema: Schema) -> OverArch:
    """Without memory for its weights."""
    with torch.device("meta"):
        return build_dense(config, schema).over_arch


def sizes_of(config: RunConfig, schema: Schema) -> dict[str, int | None]:
    over_arch = build_over_arch(config, schema)
    return {"parameters": over_arch.num_parameters, "flops_per_sample": over_arch.flops_per_sample}


def _run(path: Path, data: Path | None) -> Source:
    restored = restore_model(path, data)
    sizes = sizes_of(restored.config, restored.schema)
    return Source("run", restored.config.over_arch.label, restored.schema, path, restored.data, restored.config, sizes)


def _artifact(path: Path, data: Path | None) -> Source:
    scorer = load(path)
    label = resolve({"over_arch": scorer.manifest.over_arch}, str(path)).over_arch.label
    schema = scorer.schema
    if data is not None:
        # An artifact does not say where folds lie.
        found = Schema.read(data)
        if found.dataset_id != schema.dataset_id:
            raise UserError(f"--data {data}: dataset {found.dataset_id}, that of {path} is {schema.dataset_id}")
        schema = found.select(schema.feature_names, schema.labels)
    return Source("artifact", label, schema, path, data, None, {})


def cases_of(sources: Sequence[Source], options: argparse.Namespace, keep: Path) -> list[Case]:
    """Return every source in every mode, number of threads and, exported, precision; artifacts go under ``keep``."""
    cases = []
    for number, source in enumerate(sources):
        folders = [source.path] if source.kind == "artifact" else []
        if source.kind != "artifact" and "aot" in options.modes:
            for tables, dense in product(options.tables, options.dense):
                folders.append(keep / f"{number}-{tables}-{dense}")
                export(source, folders[-1], tables, dense)
        for threads in options.threads:
            common: dict[str, Any] = {"model": source.model, "threads": threads, "schema": source.schema}
            common["data"] = source.data
            more = f", {threads} threads" if len(options.threads) > 1 else ""
            if source.config is not None:
                own = source.path if source.kind == "run" else None
                fixed = {**source.sizes, "tables": "fp32", "dense": "fp32", "artifact_bytes": None}
                cases += [
                    Case(label=mode + more, mode=mode, source=own, config=source.config, fixed=fixed, **common)
                    for mode in options.modes
                    if mode != "aot"
                ]
            for folder in folders:
                cases.append(_aot_case(source, folder, common, more))
                if options.raw:
                    made = cases[-1]
                    cases += [replace(made, label=f"{made.label}, {kind}", raw=kind) for kind in ("mappings", "Arrow")]
    return cases


def _aot_case(source: Source, folder: Path, common: dict[str, Any], more: str) -> Case:
    scorer = load(folder)
    label = f"aot {scorer.tables} tables, {scorer.dense} dense{more}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    fixed = {"parameters": None, "flops_per_sample": None, **source.sizes, "tables": scorer.tables}
    fixed |= {"dense": scorer.dense, "artifact_bytes": size}
    return Case(label=label, mode="aot", source=folder, fixed=fixed, **common)


def export(source: Source, folder: Path, tables: Any, dense: Any) -> None:
    """Make the artifact of a run, or of a config's untrained weights, unless it is there.

    Raises:
        ValueError: see ``export_restored``; or what is there is of another over-arch.
    """
    assert source.config is not None
    if folder.exists():
        if load(folder).manifest.over_arch != source.config.over_arch.model_dump(mode="json"):
            raise UserError(f"--keep {folder.parent}: {folder} is of another over-arch; give another folder")
        return
    print(f"{source.model}: exporting with {tables} tables, {dense} dense", file=sys.stderr, flush=True)
    if source.kind == "run":
        restored = restore_model(source.path, source.data)
    else:
        model, (schema, data) = untrained(source.config, source.schema), dataset(source.config)
        restored = Restored(model, schema, source.config, data, Path("untrained"), {})
    export_restored(restored, source.path.stem, folder, Form(tables, dense), compared=Compared(rows=PARITY_ROWS))
