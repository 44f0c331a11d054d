"""Place the tables on the ranks: topology, TorchRec's planner, ``DistributedModelParallel``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from ssr_rec.common.errors import UserError
from ssr_rec.config.sharding import Kernel, ShardingConfig, ShardingType, TableConstraint
from ssr_rec.embeddings.plan_file import PlanFile, job_tables, plan_differences, read_plan, sharding_plan
from ssr_rec.embeddings.row_wise import EventTablesSharder
from ssr_rec.embeddings.tables import EventTables

SUPPORTED: dict[str, list[ShardingType]] = {
    # TorchRec has no row-wise bags on CPU; un-pooled tables have it where a config asks (row_wise.py).
    "cpu": ["table_wise", "column_wise"],
    "cuda": ["table_wise", "column_wise", "row_wise", "table_row_wise"],
}
EVENT_TYPES: dict[str, list[ShardingType]] = {"cpu": [*SUPPORTED["cpu"], "row_wise"], "cuda": SUPPORTED["cuda"]}
"""Of un-pooled tables. Row-wise is no default on a CPU: a plan made without it stays what it was."""
TOO_FEW = " for a table of so few rows that a rank would have none"
CACHING: Kernel = "fused_uvm_caching"
KERNELS: dict[str, list[Kernel]] = {
    # UVM is host memory that a GPU addresses; on a CPU the tables are in host memory anyway.
    "cpu": ["fused"],
    "cuda": ["fused", "fused_uvm", "fused_uvm_caching"],
}


def build_topology(config: ShardingConfig, device_type: str, world_size: int, local_world_size: int) -> Topology:
    capacity = int(config.memory_gib * 2**30) if config.memory_gib else None
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        HardwareConfig(
            hbm_cap_bytes=capacity if device_type == "cuda" else None,
            ddr_cap_bytes=capacity if device_type == "cpu" else None,
        ),
        KernelConfig(compute_device=device_type),
    )


def build_sharders(
    config: ShardingConfig, device_type: str, batch_size: int = 1
) -> list[ModuleSharder[EmbeddingBagCollection]]:
    """Return what shards bags and un-pooled tables, for planning and for sharding, with its communication's precision.

    Args:
        batch_size: rows of the global batch, over which the loss is a mean. Gradients travel in fp16 as if it were a
            sum: those of a large batch's mean would be below fp16's smallest normal number, 6e-5.

    Raises:
        UserError: a precision the device's communication does not have.
    """
    for key, precision in config.qcomms:
        if device_type == "cpu" and precision == "bf16":
            # TorchRec would take fp16 instead and only log it: get_qcomm_codecs_registry.
            raise UserError(f"sharding.qcomms.{key}: bf16 is not supported by gloo on CPU; use fp16, or a GPU")
    qcomms = QCommsConfig(CommType(config.qcomms.forward), CommType(config.qcomms.backward))
    registry = get_qcomm_codecs_registry(qcomms, device=torch.device(device_type))
    if registry is not None and config.qcomms.backward == "fp16":
        for codecs in registry.values():
            # A power of two changes no digit.
            codecs.backward = _ScaledCodec(2.0 ** math.floor(math.log2(batch_size)))
    # FBGEMM's default takes an id beyond its table for id 0, on the CPU without a word.
    kinds = (EmbeddingBagCollectionSharder, EventTablesSharder)
    return [kind({"bounds_check_mode": BoundsCheckMode.FATAL}, qcomm_codecs_registry=registry) for kind in kinds]


class _ScaledCodec(QuantizedCommCodec):
    """Sends gradients times ``scale`` as fp16. FBGEMM's ``loss_scale`` divides in fp16 and loses what it had kept."""

    def __init__(self, scale: float) -> None:
        super().__init__(SparseType.FP16, is_fwd=False)
        self.scale = scale

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().encode(input_tensor * self.scale, ctx)

    def decode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().decode(input_tensor, ctx) / self.scale


def build_constraints(
    tables: Sequence[str],
    config: ShardingConfig,
    device_type: str,
    fused: bool,
    prefetch: bool = False,
    spread: Mapping[str, bool] | None = None,
) -> dict[str, ParameterConstraints]:
    """Return table -> what TorchRec's planner may do with it.

    Args:
        tables: as ``plan_sharding``.
        fused: as ``plan_sharding``.
        prefetch: the pipeline fetches cached rows ahead, for which FBGEMM's cache keeps two batches.
        spread: un-pooled table -> whether row-wise sharding gives every rank a row of it (``spread_tables``).

    Raises:
        UserError: a setting without effect or not supported on the device, or an unknown table; names key and fix.
    """
    if not fused:
        return _replicated(tables, config)
    _refuse_unknown(config.per_table, tables)
    spread = spread or {}
    types: list[ShardingType] = config.types or SUPPORTED[device_type]
    _refuse("sharding.types", types, (EVENT_TYPES if any(spread.values()) else SUPPORTED)[device_type], device_type)
    _refuse("sharding.kernels", config.kernels, KERNELS[device_type], device_type)
    constraints = {}
    for name in tables:
        own = config.per_table.get(name, TableConstraint())
        # Of types for all, a table takes those it can have: bags beside row-wise un-pooled tables stay as they are.
        supported = (EVENT_TYPES if spread.get(name) else SUPPORTED)[device_type]
        fitting = [kind for kind in types if kind in supported] or supported
        own_types, kernels = own.types or fitting, own.kernels or config.kernels
        where = f"sharding.per_table.{name}"
        _refuse(f"{where}.types", own_types, supported, device_type, "" if spread.get(name, True) else TOO_FEW)
        _refuse(f"{where}.kernels", kernels, KERNELS[device_type], device_type)
        if own.cache_load_factor is not None and CACHING not in kernels:
            raise UserError(f"{where}.cache_load_factor has no effect without {CACHING} in its kernels")
        if own.min_partition is not None and "column_wise" not in own_types:
            raise UserError(f"{where}.min_partition has no effect without column_wise in its types")
        load_factor = own.cache_load_factor or config.cache_load_factor
        caches = CACHING in kernels and (load_factor is not None or prefetch)
        constraints[name] = ParameterConstraints(
            sharding_types=list(own_types),
            compute_kernels=list(kernels),
            min_partition=own.min_partition,
            cache_params=CacheParams(load_factor=load_factor, prefetch_pipeline=prefetch or None) if caches else None,
        )
    if not any(CACHING in (constraint.compute_kernels or ()) for constraint in constraints.values()):
        if config.cache_load_factor is not None:
            raise UserError(
                f"sharding.cache_load_factor={config.cache_load_factor} has no effect without {CACHING} in "
                "sharding.kernels"
            )
        if prefetch:
            raise UserError(
                f"train.pipeline: prefetch fetches the rows of {CACHING} tables, which sharding.kernels does not "
                "allow; add it, or use sparse_dist"
            )
    return constraints


def _replicated(tables: Sequence[str], config: ShardingConfig) -> dict[str, ParameterConstraints]:
    unused = [key for key in config.model_fields_set if key != "memory_gib" and not _is_default(config, key)]
    if unused:
        raise UserError(
            f"sharding.{unused[0]}={getattr(config, unused[0])} has no effect: adam keeps every table on "
            "every rank; remove it, or choose embeddings.optimizer lazy_adam, rowwise_adagrad, adagrad or sgd"
        )
    return dict.fromkeys(tables, ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["dense"]))


def _refuse_unknown(named: Iterable[str], tables: Sequence[str]) -> None:
    for name in named:
        if name not in tables:
            nearest = difflib.get_close_matches(name, tables, n=1) or [", ".join(tables)[:300]]
            raise UserError(f"sharding.per_table names {name!r}, which is no table of this model; {nearest[0]} is")


def _is_default(config: ShardingConfig, key: str) -> bool:
    return bool(getattr(config, key) == type(config).model_fields[key].default)


def _refuse(key: str, values: Sequence[str], supported: Sequence[str], device_type: str, why: str = "") -> None:
    for value in values:
        if value not in supported:
            raise UserError(f"{key}: {value!r} is not supported on {device_type}{why}; use {', '.join(supported)}")


def plan_sharding(
    model: nn.Module,
    tables: Sequence[str],
    config: ShardingConfig,
    topology: Topology,
    fused: bool,
    batch_size: int,
    prefetch: bool = False,
) -> ShardingPlan:
    """Return TorchRec's plan for ``model``, the same on every rank. Collective when a process group is initialised.

    Args:
        tables: names of the model's tables.
        fused: the tables' optimizer runs in the backward pass; otherwise every rank holds every table.
        batch_size: rows of one rank's batch, for the planner's estimates.
        prefetch: for the pipeline that fetches cached rows ahead.

    Raises:
        UserError: a setting the device does not have, or tables that do not fit these ranks.
    """
    device_type = topology.compute_device
    if config.plan is not None:
        return follow_plan(model, config, topology, fused, prefetch)
    spread = spread_tables(_event_tables(model), topology.world_size)
    constraints = build_constraints(tables, config, device_type, fused, prefetch, spread)
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
    sharders = build_sharders(config, device_type)
    # TorchRec's own collective_plan leaves the other ranks waiting when rank 0 finds no plan.
    found: list[ShardingPlan | str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [planner.plan(model, sharders)]
        except PlannerError as error:
            found = [str(error).strip().splitlines()[0]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(
            f"no sharding plan for {len(tables)} tables on {topology.world_size} {device_type} ranks: "
            f"{found[0]} Use more ranks, a smaller embeddings.dim, or raise sharding.memory_gib if the ranks have "
            "more memory"
        )
    plan = found[0]
    assert plan is not None
    kernels = [table.compute_kernel for module in plan.plan.values() for table in module.values()]
    if prefetch and CACHING not in kernels:
        raise UserError(
            "train.pipeline: prefetch has nothing to fetch, since every table fits into the GPUs' memory and the plan "
            "puts it there; use sparse_dist"
        )
    return plan


def spread_tables(tables: EventTables | None, world_size: int) -> dict[str, bool]:
    """Return un-pooled table -> whether row-wise sharding gives every rank a row; FBGEMM on CPU takes no empty shard.

    TorchRec gives each rank a block of as many rows as the others, rounded up, and the last ones what is left.
    """
    configs = tables.embedding_bag_configs() if tables is not None else []
    return {
        table.name: -(-table.num_embeddings // world_size) * (world_size - 1) < table.num_embeddings
        for table in configs
    }


def _event_tables(model: nn.Module) -> EventTables | None:
    return next((module for module in model.modules() if isinstance(module, EventTables)), None)


def follow_plan(
    model: nn.Module, config: ShardingConfig, topology: Topology, fused: bool, prefetch: bool
) -> ShardingPlan:
    """Return the plan of the file that ``config`` names, for the model and ranks of ``plan_sharding``'s arguments.

    Raises:
        UserError: not a plan file, settings that a plan overrules, or a plan for something else; every difference
            is named.
    """
    assert config.plan is not None
    overruled = [
        key for key in ShardingConfig.model_fields if key not in ("plan", "qcomms") and not _is_default(config, key)
    ]
    if overruled:
        raise UserError(
            f"sharding.{overruled[0]} has no effect beside sharding.plan, which says all; remove one of them"
        )
    # One rank reads, so that a file changed in between cannot give the ranks two plans.
    found: list[ShardingPlan | str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [_planned(model, config.plan, topology, fused, prefetch)]
        except ValueError as error:
            found = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return found[0]


def _planned(model: nn.Module, path: str, topology: Topology, fused: bool, prefetch: bool) -> ShardingPlan:
    plan, device = read_plan(path), topology.compute_device
    collections = {
        n: m.embedding_bag_configs() for n, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)
    }
    paths = {table.name: path for path, tables in collections.items() for table in tables}
    job = PlanFile(
        device=device,
        world_size=topology.world_size,
        local_world_size=topology.local_world_size,
        tables=job_tables([table for tables in collections.values() for table in tables], fused),
    )
    found = plan_differences(plan, job)
    if plan.device == device:
        spread = spread_tables(_event_tables(model), topology.world_size)
        for name, table in plan.tables.items():
            supported = (EVENT_TYPES if spread.get(name) else SUPPORTED)[device]
            if table.sharding_type not in [*supported, "data_parallel"]:
                found.append(f"table {name}: {table.sharding_type} is not supported on {device}")
            if table.kernel not in [*KERNELS[device], "dense"]:
                found.append(f"table {name}: kernel {table.kernel} is not supported on {device}")
    if prefetch and all(table.kernel != CACHING for table in plan.tables.values()):
        found.append(f"train.pipeline: prefetch fetches the rows of {CACHING} tables, and the plan has none")
    if found:
        raise UserError(
            f"sharding.plan={path} is not for this job: {'; '.join(found)}. Make it anew with "
            "tools/plan_sharding.py --save"
        )
    return sharding_plan(plan, paths, prefetch)


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    device: torch.device,
    config: ShardingConfig,
    batch_size: int,
    accumulates: bool = False,
) -> DistributedModelParallel:
    """Return ``model`` with its tables sharded by ``plan`` and everything else replicated (DDP).

    Args:
        batch_size: rows of the global batch.
        accumulates: dense gradients are not reduced after every backward pass.
    """
    # After its first step DDP orders the gradients in its buckets anew, and the sum of three and more ranks depends on
    # the place in a bucket: the first step after a resume would be another. find_unused_parameters keeps it.
    keeps_buckets = device.type == "cpu" and dist.get_world_size() > 2
    return DistributedModelParallel(
        model,
        device=device,
        plan=plan,
        sharders=build_sharders(config, device.type, batch_size),
        # DDP's static graph needs its first backward pass reduced, which accumulation does not do.
        data_parallel_wrapper=DefaultDataParallelWrapper(
            static_graph=not (accumulates or keeps_buckets), find_unused_parameters=keeps_buckets
        ),
    )
