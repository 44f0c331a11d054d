"""Builds the model of a config: sharded over the ranks, or plain on one process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from ssr_rec.common.errors import UserError
from ssr_rec.config.dense import DenseConfig
from ssr_rec.config.run import RunConfig
from ssr_rec.data.schema import Schema
from ssr_rec.data.value_columns import domain_feature
from ssr_rec.embeddings.cpu_bags import own_updates
from ssr_rec.embeddings.evicting_tables import check_managed, managed_ids
from ssr_rec.embeddings.histories import reading_of
from ssr_rec.embeddings.sharding import build_topology, plan_sharding, shard
from ssr_rec.embeddings.tables import build_tables, check_names, initialise_tables
from ssr_rec.embeddings.trained_vectors import starting_rows, trained_vectors
from ssr_rec.embeddings.weighted_ids import WeightedIds
from ssr_rec.model.ctr_model import CTRModel, DenseArch, Given
from ssr_rec.model.dense_fields import DenseFields, RowVectorFields
from ssr_rec.model.history_fields import HistoryFields
from ssr_rec.model.loss import TrainTask
from ssr_rec.model.losses.registry import build_losses
from ssr_rec.model.vector_fields import VectorFields, fill_vectors
from ssr_rec.over_archs.base import Domain, OverArch
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.registry import build_over_arch


def build_dense(config: RunConfig, schema: Schema) -> DenseArch:
    """Return over-arch, heads, encoders of sequences and what makes fields of numbers, of a run.

    Raises:
        UserError: sizes that do not fit, a name that no part of a model can have, a sequence or domain that the schema
            does not have, or settings of dense columns where it has none.
    """
    check_names(schema)
    domain = domain_of(config, schema)
    if not schema.dense and config.dense != DenseConfig():
        raise UserError(
            f"dense: {schema.name!r} has no dense columns; name them under dense in its spec and prepare the log again"
        )
    reading = reading_of(schema, config.sequences)
    histories = HistoryFields(reading, config.embeddings) if reading.histories else None
    dims = [config.embeddings.dim_of(feature.table) for feature in reading.fields]
    dims += histories.dims if histories is not None else []
    numbers = DenseFields(schema.dense, config.dense, config.embeddings.dim) if schema.dense else None
    given = [feature for feature in schema.features if feature.vectors is not None]
    trained = [feature.name for feature in trained_vectors(schema, config.embeddings)]
    vectors = VectorFields(given, config.embeddings.dim, trained) if given else None
    of_rows = RowVectorFields(schema.row_vectors, config.embeddings.dim) if schema.row_vectors else None
    made = Given(numbers, of_rows, vectors)
    dims += [dim for part in made if part is not None for dim in part.dims]
    over_arch = build_over_arch(len(dims), dims, len(schema.labels), config.over_arch, domain)
    return DenseArch(reading.fields, over_arch, config.heads, config.train.bf16, histories, made, domain)


def domain_of(config: RunConfig, schema: Schema) -> Domain | None:
    """Return the column that ``domain`` names; None: there is none.

    Raises:
        UserError: it cannot be a domain.
    """
    if config.domain is None:
        return None
    feature = domain_feature(schema, config.domain)
    if feature.table in config.embeddings.managed:
        raise UserError(
            f"domain: {config.domain!r} is in embeddings.managed, so that its ids stand for other values in time; "
            "leave it out of that"
        )
    return Domain(feature.name, feature.num_embeddings)


def build_model(
    config: RunConfig,
    schema: Schema,
    device: torch.device,
    world_size: int,
    local_world_size: int,
    folder: Path | None = None,
) -> DistributedModelParallel:
    """Return the sharded model, with weights that depend on the seed and not on the world size.

    Args:
        folder: the dataset, which has the vectors that are given; None: there are none.
    """
    given = starting_rows(schema, config.embeddings, folder)
    torch.manual_seed(config.seed)
    dense = build_dense(config, schema)
    over_arch = dense.over_arch
    reading = reading_of(schema, config.sequences)
    tables = build_tables(schema, config.embeddings, device.type, over_arch.extra_tables, reading)
    weights = [config.train.task_weights.get(label, 1.0) for label in schema.labels]
    managed = managed_ids(schema, config.embeddings, config.train.batch_size, config.seed, device)
    weighted = WeightedIds.of(schema, config.embeddings.pooling)
    place = schema.labels.index
    pairs = [(place(label), place(before)) for label, before in config.train.entire_space.items()]
    uncertain = config.train.task_weighting == "uncertainty"
    losses = build_losses(config.train, schema)
    model = CTRModel(tables, dense, managed, weighted)
    task = TrainTask(model, weights, schema.negatives, pairs, losses, uncertain)
    topology = build_topology(config.sharding, device.type, world_size, local_world_size)
    fused = config.embeddings.is_fused
    rows_per_rank = max(1, config.train.batch_size // world_size)
    names = [table.name for table in tables.configs]
    prefetch = config.train.pipeline == "prefetch"
    plan = plan_sharding(task, names, config.sharding, topology, fused, rows_per_rank, prefetch)
    check_managed(
        config.embeddings,
        {name: table.compute_kernel for module in plan.plan.values() for name, table in module.items()},
    )
    with own_updates():
        model = shard(task, plan, device, config.sharding, config.train.batch_size, config.train.accumulate > 1)
    initialise_tables(model, config.seed, config.embeddings.init_scale, given)
    fill_vectors(model.module.model.dense.vectors, schema, folder)
    if managed is not None:
        managed.bind(model)
    compile_over_arch(over_arch, config.over_arch)
    # Dropout draws of the ranks must differ; everything drawn before must not.
    torch.manual_seed(config.seed * 1_000_003 + dist.get_rank())
    return model


def compile_over_arch(over_arch: OverArch, config: OverArchConfig) -> None:
    """Does what its config's ``compile`` asks for.

    To the method, not to the module: parameters keep their names, and hooks, such as the report's, still run. Dynamic,
    because the last batch of an epoch and those of the evaluation have other rows than the rest.
    """
    if config.compile:
        over_arch.forward = torch.compile(over_arch.forward, dynamic=True)
