"""Schema to tables to ``EmbeddingBagCollection``, with its optimizer in the backward pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import SGD, Adagrad, Adam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedTensor

from ssr_rec.schema import Feature, RawHash, Schema
from ssr_rec.settings import Settings

OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "sgd": SGD, "adam": Adam}
TableDtype = Literal["fp32", "fp16"]
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
DIM_MULTIPLE = 4
"""FBGEMM's lookup kernels move rows in vectors of four elements."""


class ManagedTable(Settings):
    """A table of fixed size whose ids are admitted and evicted by training (``ssr_rec/managed.py``)."""

    rows: int = Field(ge=2, le=2**31, description="rows of the table; ids without one share the last")
    eviction: Literal["lfu", "lru", "distance_lfu"] = Field(
        "lfu", description="which ids make room: the rarest, those not seen for longest, or a mixture of both"
    )
    interval: int = Field(10, ge=1, le=65_536, description="steps over which ids are counted before some are admitted")
    admit: int = Field(1, ge=1, description="occurrences within an interval that make an id a candidate")


class EmbeddingsConfig(Settings):
    dim: int = Field(16, ge=1, description="embedding dim D of every feature not named in dims; a multiple of 4")
    dims: dict[str, int] = Field({}, description="feature -> its own dim, a multiple of 4")
    managed: dict[str, ManagedTable] = Field({}, description="feature -> its table of fixed size")
    dtype: TableDtype = Field(
        "fp32", description="of the tables' weights; pooled vectors, gradients and optimizer state are fp32 always"
    )
    dtypes: dict[str, TableDtype] = Field({}, description="feature -> its own dtype")
    pooling: Literal["mean", "sum"] = Field("mean", description="how the ids of a list feature become one vector")
    init_scale: float = Field(0.05, gt=0, description="tables start uniform in [-init_scale, init_scale]")
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = Field(
        "rowwise_adagrad",
        description="fused into the backward pass; adam on CPU has no fused form and trains replicated tables instead",
    )
    learning_rate: float = Field(0.01, ge=0)
    weight_decay: float = Field(0.0, ge=0, description="L2 on the rows of a batch (fused), on all rows (adam on CPU)")
    eps: float = Field(1e-8, gt=0, description="added to the optimizer's denominator; sgd ignores it")

    def rows_of(self, feature: Feature) -> int:
        """Rows of the feature's tables."""
        return self.managed[feature.name].rows if feature.name in self.managed else feature.num_embeddings

    def dim_of(self, feature: str) -> int:
        return self.dims.get(feature, self.dim)

    def dtype_of(self, feature: str) -> TableDtype:
        return self.dtypes.get(feature, self.dtype)

    def is_fused(self, device_type: str) -> bool:
        """Whether the optimizer runs inside the backward pass; FBGEMM has no Adam for CPU."""
        return not (self.optimizer == "adam" and device_type == "cpu")


ExtraTables = Mapping[str, Sequence[int]]
"""``OverArch.extra_tables``: name of a set of tables -> dim per feature, in schema order."""


def columns_per_dim(dims: Sequence[int]) -> int:
    """Columns of a table that make up one dim: 1, or 4 or 2 where a dim is no multiple of what FBGEMM can store.

    The dim is the mean of its columns. Each of them gets the gradient of a single one, so that learning rate and weight
    decay weigh what they do elsewhere.
    """
    return DIM_MULTIPLE // math.gcd(*dims, DIM_MULTIPLE)


def table_dims(schema: Schema, config: EmbeddingsConfig, extra: ExtraTables) -> dict[str, tuple[Feature, int]]:
    """Every table of a model: its name -> its feature and its columns.

    The table of a feature has the feature's name, one of an extra set ``feature@set``.

    Raises:
        ValueError: ``dims`` or ``dtypes`` name an unknown feature, a dim is not a multiple of 4, or a feature has a
            name that no PyTorch module can have.
    """
    for name in schema.feature_names:
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"feature {name!r} of {schema.name!r}: PyTorch takes no table of that name; rename the column and "
                "prepare the log again, or leave it out by data.features"
            )
    named: dict[str, Mapping[str, object]] = {"dims": config.dims, "dtypes": config.dtypes, "managed": config.managed}
    for key, features in named.items():
        unknown = sorted(set(features) - set(schema.feature_names))
        if unknown:
            raise ValueError(
                f"embeddings.{key} names {unknown[0]!r}, which is no feature of {schema.name!r}; "
                f"it has {', '.join(schema.feature_names)}"
            )
    for feature in schema.features:
        if isinstance(feature.encoding, RawHash) and feature.name not in config.managed:
            raise ValueError(
                f"feature {feature.name!r} of {schema.name!r} holds raw hashes, for which no table is large enough; "
                f"give it one by embeddings.managed.{feature.name}.rows, or leave it out by data.features"
            )
    for key, dim in {
        "embeddings.dim": config.dim,
        **{f"embeddings.dims.{k}": v for k, v in config.dims.items()},
    }.items():
        if dim % DIM_MULTIPLE:
            raise ValueError(f"{key}={dim} must be a multiple of {DIM_MULTIPLE}, which FBGEMM's kernels need")
    tables = {feature.name: (feature, config.dim_of(feature.name)) for feature in schema.features}
    for name, dims in extra.items():
        columns = columns_per_dim(dims)
        for feature, dim in zip(schema.features, dims, strict=True):
            tables[f"{feature.name}@{name}"] = (feature, dim * columns)
    return tables


def build_tables(
    schema: Schema, config: EmbeddingsConfig, device_type: str, extra: ExtraTables | None = None
) -> EmbeddingBagCollection:
    """One table per feature and set, on the meta device: memory is taken by the shards only.

    Raises:
        ValueError: as ``table_dims``; or half-precision tables whose optimizer has no form that keeps its state exact.
    """
    halves = [feature for feature in schema.feature_names if config.dtype_of(feature) != "fp32"]
    if halves and not config.is_fused(device_type):
        raise ValueError(
            f"embeddings.dtype: {halves[0]!r} is {config.dtype_of(halves[0])}, but adam on CPU would keep its moments "
            "in that precision too; use fp32, or choose embeddings.optimizer rowwise_adagrad, adagrad or sgd"
        )
    tables = plain_tables(schema, config, torch.device("meta"), extra)
    if config.is_fused(device_type):
        settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if config.optimizer != "sgd":
            settings["eps"] = config.eps
        apply_optimizer_in_backward(OPTIMIZERS[config.optimizer], tables.parameters(), settings)
    return tables


def plain_tables(
    schema: Schema, config: EmbeddingsConfig, device: torch.device, extra: ExtraTables | None = None
) -> EmbeddingBagCollection:
    """The tables of ``build_tables`` on any device and without an optimizer.

    Raises:
        ValueError: as ``table_dims``.
    """
    pooling = PoolingType.MEAN if config.pooling == "mean" else PoolingType.SUM
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=name,
                feature_names=[feature.name],
                num_embeddings=config.rows_of(feature),
                embedding_dim=columns,
                data_type=DTYPES[config.dtype_of(feature.name)],
                # The pooling of one id is itself; one pooling per kernel call keeps the calls few.
                pooling=pooling if feature.kind == "list" else PoolingType.SUM,
            )
            for name, (feature, columns) in table_dims(schema, config, extra or {}).items()
        ],
    )


class ConcatFields(nn.Module):
    """``KeyedTensor`` to the inputs of the over-arch: (B, sum of dims) for the features' tables and each extra set.

    ``KeyedTensor.values()`` of a sharded collection is ordered by the sharding plan, so the order is restored by
    name: SSR-S's indices, and any checkpoint, depend on it.
    """

    def __init__(self, feature_names: Sequence[str], extra: ExtraTables | None = None) -> None:
        super().__init__()
        self.keys, self.columns = [list(feature_names)], [1]
        if extra:
            # TorchRec's names for a feature that several tables look up: feature@table.
            self.keys = [[f"{name}@{name}" for name in feature_names]]
            for set_name, dims in extra.items():
                self.keys.append([f"{name}@{name}@{set_name}" for name in feature_names])
                self.columns.append(columns_per_dim(dims))

    def forward(self, embeddings: KeyedTensor) -> list[Tensor]:
        if embeddings.keys() == self.keys[0]:
            return [embeddings.values()]
        parts = embeddings.values().split(embeddings.length_per_key(), dim=1)
        by_name = dict(zip(embeddings.keys(), parts, strict=True))
        inputs = []
        for keys, columns in zip(self.keys, self.columns, strict=True):
            x = torch.cat([by_name[key] for key in keys], dim=1)
            if columns > 1:
                x = x.unflatten(1, (-1, columns)).mean(2)
                if x.requires_grad:
                    # The mean hands each of its columns only a share of the gradient.
                    x.register_hook(partial(torch.mul, other=columns))
            inputs.append(x)
        return inputs


ROWS_PER_SEED = 65_536


def initialise_tables(model: nn.Module, seed: int, scale: float) -> None:
    """Fill every (shard of a) table with uniform numbers that depend on seed, table, row and column alone.

    TorchRec initialises each shard on its rank, so that a run's start would depend on the world size. Here rows
    come in blocks of ``ROWS_PER_SEED`` with a seed of their own, and a rank draws the blocks its shards touch.
    """
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if ".embedding_bags." not in key:
                continue
            table = key.split(".embedding_bags.")[1].removesuffix(".weight")
            if isinstance(value, ShardedTensor):
                columns = value.size(1)
                for shard in value.local_shards():
                    _fill(shard.tensor, table, seed, scale, columns, *shard.metadata.shard_offsets)
            else:
                _fill(value, table, seed, scale, value.size(1), 0, 0)


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
