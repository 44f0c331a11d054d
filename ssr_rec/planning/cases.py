"""What is planned: a run's config, its tables with the ids a row brings, and the ranks they are for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from ssr_rec.config import RunConfig
from ssr_rec.hardware import Hardware
from ssr_rec.places import place, source
from ssr_rec.schema import Drawn, Feature, Schema, first_problem
from ssr_rec.settings import Settings
from ssr_rec.yaml_file import read_yaml

MAX_ROWS = 2**40


class TableLine(Settings):
    """One feature of a tables file, or several alike."""

    name: str
    rows: int = Field(ge=1, le=MAX_ROWS)
    dim: int | None = Field(None, ge=1, description="None: embeddings.dim of the config")
    kind: Literal["single", "list"] = "single"
    mean_length: float = Field(1.0, gt=0, le=100_000, description="ids a row brings on average; lists only")
    repeat: int | None = Field(None, ge=1, le=10_000, description="as many features, named name_0, name_1, ...")


class TablesFile(Settings):
    """Features of a log that is not prepared, or not there yet."""

    labels: list[str] = Field(["click"], min_length=1)
    tables: list[TableLine] = Field(min_length=1)


@dataclass(frozen=True)
class World:
    """``nodes`` hosts of ``per_node`` ranks."""

    nodes: int
    per_node: int
    hardware: Hardware

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node} {self.hardware.name}"


@dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
        lengths: feature -> mean number of ids a row brings; 1 for those not named.
    """

    config: RunConfig
    schema: Schema
    lengths: Mapping[str, float]
    world: World

    def __post_init__(self) -> None:
        if self.config.embeddings.managed:
            raise ValueError(
                "embeddings.managed: the map of ids that every rank holds, and the exchange of ids that comes before "
                "the tables', are not in the estimates; plan without it, with the same rows in a tables file"
            )

    @property
    def rows_per_rank(self) -> int:
        """Of one batch, rounded up: the rank with the most decides."""
        return -(-self.config.train.batch_size // self.world.size)


def make_world(nodes: int, per_node: int, hardware: Hardware) -> World:
    """
    Raises:
        ValueError: a number of nodes or ranks that cannot be.
    """
    if nodes < 1 or per_node < 1:
        raise ValueError(f"{nodes}x{per_node}: a job has at least one node and one rank on it")
    if per_node > hardware.max_ranks_per_node:
        raise ValueError(
            f"{per_node} ranks on one {hardware.name} host, which has {hardware.max_ranks_per_node}; use more nodes"
        )
    if nodes * per_node > 16_384:
        raise ValueError(f"{nodes}x{per_node} is more than 16,384 ranks, the most that are planned here")
    return World(nodes, per_node, hardware)


def parse_world(text: str, hardware: Hardware) -> World:
    """``2x8``: two nodes of eight ranks.

    Raises:
        ValueError: not of that form.
    """
    nodes, times, per_node = text.strip().partition("x")
    if not (times and nodes.isdigit() and per_node.isdigit()):
        raise ValueError(f"world {text!r} is not understood; write NODESxRANKS, as in 2x8")
    return make_world(int(nodes), int(per_node), hardware)


def read_tables(path: str | Path, config: RunConfig) -> tuple[RunConfig, Schema, dict[str, float]]:
    """A tables file as (config with the file's dims, schema, mean lengths); configs/plan has examples.

    Raises:
        ValueError: unreadable or not such a file; the message names the entry.
    """
    values = read_yaml(path, "a tables file such as those in configs/plan/")
    try:
        file = TablesFile.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {first_problem(error)}") from None
    features, lengths, dims = [], {}, dict(config.embeddings.dims)
    for line in file.tables:
        if line.kind == "single" and line.mean_length != 1.0:
            raise ValueError(f"{path}: {line.name}: mean_length is of lists; add kind: list")
        names = [line.name] if line.repeat is None else [f"{line.name}_{i}" for i in range(line.repeat)]
        for name in names:
            is_list = line.kind == "list"
            features.append(
                Feature(
                    name=name,
                    kind="list" if is_list else "categorical",
                    num_embeddings=line.rows,
                    encoding=Drawn(column=name),
                    max_length=max(1, round(2 * line.mean_length)) if is_list else None,
                )
            )
            lengths[name] = line.mean_length
            if line.dim is not None:
                dims[name] = line.dim
    try:
        schema = Schema(name=Path(path).stem, dataset_id="", features=features, labels=file.labels, splits={})
    except ValidationError as error:
        raise ValueError(f"{path}: {first_problem(error)}") from None
    embeddings = config.embeddings.model_copy(update={"dims": dims})
    return config.model_copy(update={"embeddings": embeddings}), schema, lengths


def mean_lengths(folder: str | Path, schema: Schema) -> dict[str, float]:
    """List feature -> mean ids a row of the training split brings, from the footers of its shards.

    An empty list counts as one entry in a footer, so short lists come out a little long. A dataset without shards
    gets the longest length there can be.
    """
    lists = {feature.name: 0 for feature in schema.features if feature.kind == "list"}
    rows, train = 0, schema.splits.get("train")
    for shard in train.shards if train and lists else []:
        footer = pq.read_metadata(source(place(folder) / shard.path))
        rows += footer.num_rows
        for group in range(footer.num_row_groups):
            for index in range(footer.num_columns):
                column = footer.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                if name in lists:
                    lists[name] += column.num_values
    most = {feature.name: float(feature.max_length or 1) for feature in schema.features}
    return {name: count / rows if rows else most[name] for name, count in lists.items()}


def override_rows(schema: Schema, rows: Mapping[str, int], scale: float = 1.0) -> Schema:
    """The schema with other numbers of rows: all times ``scale``, then those named.

    Raises:
        ValueError: an unknown feature (the nearest is named), or a number of rows that no table has.
    """
    for name, count in rows.items():
        if name not in schema.feature_names:
            nearest = difflib.get_close_matches(name, schema.feature_names, n=1) or [", ".join(schema.feature_names)]
            raise ValueError(f"--rows names {name!r}, which is no feature of {schema.name!r}; {nearest[0][:300]} is")
        if not 1 <= count <= MAX_ROWS:
            raise ValueError(f"--rows {name}={count}: a table has 1 to {MAX_ROWS:,} rows")
    features = []
    for feature in schema.features:
        count = rows.get(feature.name, max(1, round(feature.num_embeddings * scale)))
        if count > MAX_ROWS:
            raise ValueError(
                f"--scale-rows {scale:g}: {feature.name} would have {count:,} rows, more than {MAX_ROWS:,}"
            )
        features.append(feature.model_copy(update={"num_embeddings": count}))
    return schema.model_copy(update={"features": features})


def parse_rows(texts: Sequence[str]) -> dict[str, int]:
    """``user_id=2_000_000_000`` and so on.

    Raises:
        ValueError: not of that form, or a feature given twice.
    """
    rows: dict[str, int] = {}
    for text in texts:
        name, _, count = text.rpartition("=")
        digits = count.replace("_", "").replace(",", "")
        if not (name and digits.isdigit() and len(digits) <= 20):
            raise ValueError(f"--rows {text!r} is not understood; write FEATURE=ROWS, as in user_id=2_000_000_000")
        if name in rows:
            raise ValueError(f"--rows names {name!r} twice")
        rows[name] = int(digits)
    return rows
