"""Describes what is planned: a run's config, its tables with the ids a row brings, and the ranks they are for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import place, source
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.config.run import RunConfig
from ssr_rec.data.dense import DenseColumn
from ssr_rec.data.features import AdmittedHashing, Drawn, Feature, Hashing, Vocabulary
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.histories import Reading, reading_of
from ssr_rec.planning.hardware import Hardware

MAX_ROWS = 2**40


class TableLine(Settings):
    """Describes one feature of a tables file, or several alike."""

    name: str
    rows: int = Field(ge=1, le=MAX_ROWS)
    dim: int | None = Field(None, ge=1, description="None: embeddings.dim of the config")
    kind: Literal["single", "list"] = "single"
    mean_length: float = Field(1.0, gt=0, le=100_000, description="ids a row brings on average; lists only")
    repeat: int | None = Field(None, ge=1, le=10_000, description="as many features, named name_0, name_1, ...")


class TablesFile(Settings):
    """Lists features of a log that is not prepared, or not there yet."""

    labels: list[str] = Field(["click"], min_length=1)
    dense: int = Field(0, ge=0, le=65_536, description="raw numbers of a row")
    dense_bins: int = Field(64, ge=1, le=4096, description="quantile bins of each of them")
    tables: list[TableLine] = Field(min_length=1)


@dataclass(frozen=True)
class World:
    """Describes ``nodes`` hosts of ``per_node`` ranks."""

    nodes: int
    per_node: int
    hardware: Hardware

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node} {self.hardware.name}"


@dataclass(frozen=True)
class RowLookups:
    """Says how often training looks up each row of a table.

    Attributes:
        first: (n,) of its first rows, one by one.
        rest: of all further rows together, taken to be even.
        rows: of the table, at least ``n``.
    """

    first: np.ndarray
    rest: int
    rows: int

    def block_shares(self, blocks: int) -> np.ndarray:
        """Return the share (blocks,) of all lookups that each of so many equal blocks of rows gets."""
        known, total = len(self.first), self.first.sum() + self.rest
        if not total:
            return np.full(blocks, 1 / blocks)
        ends = np.minimum(np.arange(1, blocks + 1) * -(-self.rows // blocks), self.rows)
        upto = np.concatenate(([0], np.cumsum(self.first)))[np.minimum(ends, known)]
        upto = upto + self.rest * (np.maximum(ends - known, 0) / max(self.rows - known, 1))
        return np.diff(upto, prepend=0) / total


@dataclass(frozen=True)
class Case:
    """Describes what is planned.

    Attributes:
        lengths: feature -> mean number of ids a row brings; 1 for those not named.
        lookups: feature -> those of its table's rows in training; evenly for those not named.
    """

    config: RunConfig
    schema: Schema
    lengths: Mapping[str, float]
    world: World
    lookups: Mapping[str, RowLookups] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.config.embeddings.managed:
            raise UserError(
                "embeddings.managed: the map of ids that every rank holds, and the exchange of ids that comes before "
                "the tables', are not in the estimates; plan without it, with the same rows in a tables file"
            )

    def block_shares(self, table: str, blocks: int) -> np.ndarray:
        """Return the share (blocks,) of a table's lookups that each of so many equal blocks of its rows gets."""
        # Of a shared table, the lookups of its single-valued features, if any, else of its first.
        readers = [f for f in self.schema.features if f.table == table and f.name in self.lookups]
        readers.sort(key=lambda feature: feature.kind == "list")
        return self.lookups[readers[0].name].block_shares(blocks) if readers else np.full(blocks, 1 / blocks)

    def bags(self, table: str) -> float:
        """Return the mean bags that a row of the log makes of a table: 1, or all its ids where it is read un-pooled."""
        return sum(self.lengths.get(feature.name, 1.0) for feature in self.reading.events.get(table, ())) or 1.0

    def is_weighted(self, table: str) -> bool:
        """Return whether a table, or one of an over-arch's own beside it, is looked up with weights."""
        return table.partition("@")[0] in self.weighted_tables

    @cached_property
    def weighted_tables(self) -> list[str]:
        """Return ``Schema.weighted_tables``; kept, as ``reading`` is."""
        return self.schema.weighted_tables

    @cached_property
    def reading(self) -> Reading:
        """Return how the model reads each feature; kept, as the search asks for every shard of every option."""
        return reading_of(self.schema, self.config.sequences)

    @property
    def rows_per_rank(self) -> int:
        """Return the rows of one batch on a rank, rounded up: the rank with the most decides."""
        return -(-self.config.train.batch_size // self.world.size)


def table_lookups(folder: Path, schema: Schema) -> dict[str, RowLookups]:
    """Return, for every feature with a vocabulary or a hash, how often training looks up the rows of its table.

    Counts of values stand in the vocabulary's file, those of missing and out-of-vocabulary values in the schema; the
    buckets of a hash, and the values that have given vectors, are taken to be even.
    """
    found = {}
    trained = schema.trained_lookups
    for feature in schema.features:
        encoding, rows, counted = feature.encoding, feature.num_embeddings, trained.get(feature.name)
        if isinstance(encoding, Vocabulary) and feature.vectors is None:
            table = pq.read_table(source(folder / encoding.file), columns=["id", "count"])
            counts = np.zeros(rows, dtype=np.int64)
            counts[table["id"].to_numpy()] = table["count"].to_numpy()
            if counted is not None:
                counts[encoding.missing_id], counts[encoding.oov_id] = counted.missing, counted.oov
            found[feature.name] = RowLookups(counts, 0, rows)
        elif isinstance(encoding, (Vocabulary, Hashing, AdmittedHashing)) and counted is not None:
            # Before the first bucket: the rows of missing values, and of those that were not admitted.
            counts = np.array([counted.missing, counted.oov][: getattr(encoding, "first_id", 2)])
            found[feature.name] = RowLookups(counts, counted.total - int(counts.sum()), rows)
    return found


def make_world(nodes: int, per_node: int, hardware: Hardware) -> World:
    """Describe a job of so many nodes and ranks on each.

    Raises:
        UserError: a number of nodes or ranks that cannot be.
    """
    if nodes < 1 or per_node < 1:
        raise UserError(f"{nodes}x{per_node}: a job has at least one node and one rank on it")
    if per_node > hardware.max_ranks_per_node:
        raise UserError(
            f"{per_node} ranks on one {hardware.name} host, which has {hardware.max_ranks_per_node}; use more nodes"
        )
    if nodes * per_node > 16_384:
        raise UserError(f"{nodes}x{per_node} is more than 16,384 ranks, the most that are planned here")
    return World(nodes, per_node, hardware)


def parse_world(text: str, hardware: Hardware) -> World:
    """Parse ``2x8``: two nodes of eight ranks.

    Raises:
        UserError: not of that form.
    """
    nodes, times, per_node = text.strip().partition("x")
    if not (times and nodes.isdigit() and per_node.isdigit()):
        raise UserError(f"world {text!r} is not understood; write NODESxRANKS, as in 2x8")
    return make_world(int(nodes), int(per_node), hardware)


def read_tables(path: str | Path, config: RunConfig) -> tuple[RunConfig, Schema, dict[str, float]]:
    """Return a tables file as (config with the file's dims, schema, mean lengths); configs/plan has examples.

    Raises:
        UserError: unreadable or not such a file; the message names the entry.
    """
    values = read_yaml(path, "a tables file such as those in configs/plan/")
    try:
        file = TablesFile.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    features, lengths, dims = [], {}, dict(config.embeddings.dims)
    for line in file.tables:
        if line.kind == "single" and line.mean_length != 1.0:
            raise UserError(f"{path}: {line.name}: mean_length is of lists; add kind: list")
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
    edges = [float(edge) for edge in range(file.dense_bins + 1)]
    dense = [
        DenseColumn(name=f"dense_{i}", scale="standard", mean=0.0, std=1.0, edges=edges) for i in range(file.dense)
    ]
    try:
        schema = Schema(
            name=Path(path).stem, dataset_id="", features=features, dense=dense, labels=file.labels, splits={}
        )
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
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
    """Return the schema with other numbers of rows: all times ``scale``, then those named.

    Raises:
        UserError: an unknown feature (the nearest is named), or a number of rows that no table has.
    """
    for name, count in rows.items():
        if name not in schema.feature_names:
            nearest = difflib.get_close_matches(name, schema.feature_names, n=1) or [", ".join(schema.feature_names)]
            raise UserError(f"--rows names {name!r}, which is no feature of {schema.name!r}; {nearest[0][:300]} is")
        if not 1 <= count <= MAX_ROWS:
            raise UserError(f"--rows {name}={count}: a table has 1 to {MAX_ROWS:,} rows")
    features = []
    for feature in schema.features:
        count = rows.get(feature.name, max(1, round(feature.num_embeddings * scale)))
        if count > MAX_ROWS:
            raise UserError(f"--scale-rows {scale:g}: {feature.name} would have {count:,} rows, more than {MAX_ROWS:,}")
        features.append(feature.model_copy(update={"num_embeddings": count}))
    return schema.model_copy(update={"features": features})


def parse_rows(texts: Sequence[str]) -> dict[str, int]:
    """Parse ``user_id=2_000_000_000`` and so on.

    Raises:
        UserError: not of that form, or a feature given twice.
    """
    rows: dict[str, int] = {}
    for text in texts:
        name, _, count = text.rpartition("=")
        digits = count.replace("_", "").replace(",", "")
        if not (name and digits.isdigit() and len(digits) <= 20):
            raise UserError(f"--rows {text!r} is not understood; write FEATURE=ROWS, as in user_id=2_000_000_000")
        if name in rows:
            raise UserError(f"--rows names {name!r} twice")
        rows[name] = int(digits)
    return rows
