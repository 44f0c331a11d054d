"""Turns a schema into tables and an ``EmbeddingBagCollection`` with its optimizer in the backward pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import SGD, Adagrad, Adam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.data.features import Feature, RawHash
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.histories import Reading
from ssr_rec.embeddings.trained_vectors import copy_rows, refuse_given, trained_vectors

OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "sgd": SGD, "lazy_adam": Adam}
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
DIM_MULTIPLE = 4
"""FBGEMM's lookup kernels move rows in vectors of four elements."""


ExtraTables = Mapping[str, Sequence[int]]
"""``OverArch.extra_tables``: name of a set of tables -> dim per feature, in schema order."""


def columns_per_dim(dims: Sequence[int]) -> int:
    """Return columns of a table that make up one dim: 1, or 4 or 2 where a dim is no multiple of what FBGEMM can store.

    The dim is the mean of its columns. Each of them gets the gradient of a single one, so that learning rate and weight
    decay weigh what they do elsewhere.
    """
    return DIM_MULTIPLE // math.gcd(*dims, DIM_MULTIPLE)


class EventTables(EmbeddingBagCollection):
    """Holds the tables that sequences read un-pooled, as bags of one id each (``histories.EventIds``)."""


class Tables(NamedTuple):
    """Holds the collections of a model."""

    pooled: EmbeddingBagCollection
    events: EventTables | None
    """Of the tables that sequences read: a bag of one id an event, keyed by table (``histories.EventIds``)."""
    weighted: EmbeddingBagCollection | None = None
    """Of the tables that weighted lists read (``weighted_ids.WeightedIds``)."""

    @property
    def configs(self) -> list[EmbeddingBagConfig]:
        """Return those of all collections."""
        return [config for one in self if one is not None for config in one.embedding_bag_configs()]


def table_dims(
    schema: Schema, config: EmbeddingsConfig, extra: ExtraTables, reading: Reading | None = None
) -> dict[str, tuple[Feature, int]]:
    """Return every table of a model: its name -> its feature, or the first of them, and its columns.

    The table of a feature has the feature's name, or that of the vocabulary it shares; one of an extra set is
    ``table@set``. Vectors that are trained have as many columns as they have entries, rounded up to a multiple of 4.

    Raises:
        UserError: ``dims``, ``dtypes`` or ``trained_vectors`` name what is none, a dim is not a multiple of 4, or a
            feature has a name that no PyTorch module can have.
    """
    check_names(schema)
    names = list(dict.fromkeys(feature.table for feature in schema.embedded))
    vectors = {feature.name: feature for feature in trained_vectors(schema, config)}
    named: dict[str, Mapping[str, object]] = {"dims": config.dims, "dtypes": config.dtypes, "managed": config.managed}
    for key, entries in named.items():
        unknown = sorted(set(entries) - {*names, *(vectors if key == "dtypes" else ())})
        if unknown:
            refuse_given(key, unknown[0], schema, vectors)
            shared = {feature.name: feature.table for feature in schema.embedded}.get(unknown[0])
            if shared is not None:
                raise UserError(f"embeddings.{key} names {unknown[0]!r}, whose table is {shared!r}: name that")
            raise UserError(
                f"embeddings.{key} names {unknown[0]!r}, which is no feature of {schema.name!r}; "
                f"it has {', '.join(schema.feature_names)}"
            )
    _check_raw_hashes(schema, config)
    for key, dim in {
        "embeddings.dim": config.dim,
        **{f"embeddings.dims.{k}": v for k, v in config.dims.items()},
    }.items():
        if dim % DIM_MULTIPLE:
            raise UserError(f"{key}={dim} must be a multiple of {DIM_MULTIPLE}, which FBGEMM's kernels need")
    tables: dict[str, tuple[Feature, int]] = {}
    for feature in schema.embedded:
        tables.setdefault(feature.table, (feature, config.dim_of(feature.table)))
    for name, feature in vectors.items():
        assert feature.vectors is not None
        tables[name] = (feature, -(-feature.vectors.dim // DIM_MULTIPLE) * DIM_MULTIPLE)
    for set_name, dims in extra.items():
        columns = columns_per_dim(dims)
        # Beyond the features' fields come those of encoders, which have no table.
        for feature, dim in zip(reading.fields if reading else schema.embedded, dims, strict=False):
            tables.setdefault(f"{feature.table}@{set_name}", (feature, dim * columns))
    return tables


def check_names(schema: Schema) -> None:
    """Refuse names after which no part of a model can be named: of features, tables, and sequences.

    Raises:
        UserError: names one.
    """
    kinds = {"sequence": [sequence.name for sequence in schema.sequences]}
    kinds["feature"] = [*schema.feature_names, *(feature.table for feature in schema.embedded)]
    for kind, names in kinds.items():
        for name in dict.fromkeys(names):
            if not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise UserError(
                    f"{kind} {name!r} of {schema.name!r}: PyTorch takes no table of that name; rename it and prepare "
                    "the log again, or leave it out by data.features"
                )


def _check_raw_hashes(schema: Schema, config: EmbeddingsConfig) -> None:
    for feature in schema.features:
        if isinstance(feature.encoding, RawHash) and feature.name not in config.managed:
            raise UserError(
                f"feature {feature.name!r} of {schema.name!r} holds raw hashes, for which no table is large enough; "
                f"give it one by embeddings.managed.{feature.name}.rows, or leave it out by data.features"
            )
        if feature.vocabulary is not None and feature.vocabulary in config.managed:
            raise UserError(
                f"embeddings.managed names {feature.vocabulary!r}, a table of several features: those of fixed size "
                "are of one feature each"
            )


def build_tables(
    schema: Schema,
    config: EmbeddingsConfig,
    device_type: str,
    extra: ExtraTables | None = None,
    reading: Reading | None = None,
) -> Tables:
    """Return one table per feature or vocabulary and set, on the meta device: memory is taken by the shards only.

    Raises:
        UserError: as ``table_dims``; or half-precision tables whose optimizer has no form that keeps its state exact.
    """
    with_tables = [*schema.embedded, *trained_vectors(schema, config)]
    halves = [feature.table for feature in with_tables if config.dtype_of(feature.table) != "fp32"]
    if halves and not config.takes_halves(device_type):
        raise UserError(
            f"embeddings.dtype: {halves[0]!r} is {config.dtype_of(halves[0])}, but {config.optimizer} here "
            "moves fp32 tables alone; use fp32, or embeddings.optimizer rowwise_adagrad, adagrad or sgd"
        )
    tables = plain_tables(schema, config, torch.device("meta"), extra, reading)
    if config.is_fused:
        settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if config.optimizer != "sgd":
            settings["eps"] = config.eps
        for collection in tables:
            if collection is not None:
                apply_optimizer_in_backward(OPTIMIZERS[config.optimizer], collection.parameters(), settings)
    return tables


def plain_tables(
    schema: Schema,
    config: EmbeddingsConfig,
    device: torch.device,
    extra: ExtraTables | None = None,
    reading: Reading | None = None,
) -> Tables:
    """Return the tables of ``build_tables`` on any device and without an optimizer.

    Raises:
        UserError: as ``table_dims``.
    """
    fields, given = reading.fields if reading else schema.embedded, trained_vectors(schema, config)
    pooled: list[EmbeddingBagConfig] = []
    events: list[EmbeddingBagConfig] = []
    weighted: list[EmbeddingBagConfig] = []
    for name, (feature, columns) in table_dims(schema, config, extra or {}, reading).items():
        readers = [other for other in (*fields, *given) if other.table == feature.table]
        is_event = reading is not None and name in reading.events
        # The pooling of one id is itself; one pooling per kernel call keeps the calls few.
        is_weighted = feature.table in schema.weighted_tables
        is_mean = config.pooling == "mean" and not is_event and any(reader.kind == "list" for reader in readers)
        table = EmbeddingBagConfig(
            name=name,
            feature_names=[name] if is_event else [reader.name for reader in readers],
            num_embeddings=config.rows_of(feature),
            embedding_dim=columns,
            data_type=DTYPES[config.dtype_of(feature.table)],
            # What makes a mean of a weighted sum stands in the weights.
            pooling=PoolingType.MEAN if is_mean and not is_weighted else PoolingType.SUM,
        )
        (events if is_event else weighted if is_weighted else pooled).append(table)
    return Tables(
        EmbeddingBagCollection(device=device, tables=pooled),
        EventTables(device=device, tables=events) if events else None,
        # Apart, since FBGEMM's backward pass takes some 1.5 times as long with weights.
        EmbeddingBagCollection(device=device, tables=weighted, is_weighted=True) if weighted else None,
    )


class ConcatFields(nn.Module):
    """Turns a ``KeyedTensor`` into the over-arch's inputs: (B, sum of dims) for the fields and for each extra set.

    ``KeyedTensor.values()`` of a sharded collection is ordered by the sharding plan, so the order is restored by
    name: SSR-S's indices, and any checkpoint, depend on it.

    Args:
        fields: the features that have a field, in order.
        unpooled: those of them whose vectors come from the un-pooled tables.
    """

    def __init__(
        self, fields: Sequence[Feature], extra: ExtraTables | None = None, unpooled: Collection[str] = ()
    ) -> None:
        super().__init__()
        names = [feature.name for feature in fields]
        self.keys, self.columns = [names], [1]
        if extra:
            # TorchRec's names for a feature that several pooled tables look up: feature@table.
            by_table = {name: f"{name}@{feature.table}" for name, feature in zip(names, fields, strict=True)}
            alone = set(unpooled) if len(extra) == 1 else set()
            self.keys = [[name if name in unpooled else by_table[name] for name in names]]
            for set_name, dims in extra.items():
                self.keys.append([name if name in alone else f"{by_table[name]}@{set_name}" for name in names])
                self.columns.append(columns_per_dim(dims))

    def forward(
        self,
        embeddings: KeyedTensor,
        unpooled: Mapping[str, Tensor] | None = None,
        weighted: KeyedTensor | None = None,
    ) -> list[Tensor]:
        if embeddings.keys() == self.keys[0]:
            return [embeddings.values()]
        by_name = by_key(embeddings) | (by_key(weighted) if weighted is not None else {})
        inputs: list[Tensor] = []
        for keys, columns in zip(self.keys, self.columns, strict=True):
            # A name may stand for a vector of an un-pooled table in the main set and of a pooled one in an extra set.
            own = by_name if inputs else {**by_name, **(unpooled or {})}
            x = torch.cat([own[key] for key in keys], dim=1)
            if columns > 1:
                x = x.unflatten(1, (-1, columns)).mean(2)
                if x.requires_grad:
                    # The mean hands each of its columns only a share of the gradient.
                    x.register_hook(partial(torch.mul, other=columns))
            inputs.append(x)
        return inputs


def by_key(embeddings: KeyedTensor) -> dict[str, Tensor]:
    """Return key -> its columns (B, D)."""
    pieces = embeddings.values().split(embeddings.length_per_key(), dim=1)
    return dict(zip(embeddings.keys(), pieces, strict=True))


ROWS_PER_SEED = 65_536


def initialise_tables(model: nn.Module, seed: int, scale: float, given: Mapping[str, np.ndarray] | None = None) -> None:
    """Fill every (shard of a) table with uniform numbers that depend on seed, table, row and column alone.

    TorchRec initialises each shard on its rank, so that a run's start would depend on the world size. Here rows
    come in blocks of ``ROWS_PER_SEED`` with a seed of their own, and a rank draws the blocks its shards touch.

    Args:
        given: table -> the vectors (rows, E) that it begins with instead.
    """
    given = given or {}
    with torch.no_grad():
        for table, columns, shard, (row, column) in _shards(model):
            if table in given:
                copy_rows(shard, given[table], row, column)
            else:
                _fill(shard, table, seed, scale, columns, row, column)


def _shards(model: nn.Module) -> Iterator[tuple[str, int, Tensor, Sequence[int]]]:
    """Yield, of every table or shard of one on this rank, the table, its columns, the values and where they begin."""
    for key, value in model.state_dict().items():
        if ".embedding_bags." not in key:
            continue
        table = key.split(".embedding_bags.")[1].removesuffix(".weight")
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                yield table, value.size(1), shard.tensor, shard.metadata.shard_offsets
        else:
            yield table, value.size(1), value, (0, 0)


def _fill(
    shard: Tensor, table: str, seed: int, scale: float, table_columns: int, first_row: int, first_column: int
) -> None:
    rows, columns = shard.shape
    for block in range(first_row // ROWS_PER_SEED, -(-(first_row + rows) // ROWS_PER_SEED)):
        digest = hashlib.sha256(f"{seed}/{table}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        start = max(first_row, block * ROWS_PER_SEED)
        stop = min(first_row + rows, (block + 1) * ROWS_PER_SEED)
        # The generator fills row by row, so the rows up to `stop` do not depend on how long the table is.
        drawn = torch.empty(stop - block * ROWS_PER_SEED, table_columns).uniform_(-scale, scale, generator=generator)
        wanted = drawn[start - block * ROWS_PER_SEED :, first_column : first_column + columns]
        shard[start - first_row : stop - first_row].copy_(wanted)
