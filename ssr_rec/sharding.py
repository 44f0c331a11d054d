"""Place the tables on the ranks: topology, TorchRec's planner, ``DistributedModelParallel``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan

from ssr_rec.settings import Settings

ShardingType = Literal["table_wise", "column_wise", "row_wise", "table_row_wise"]
SUPPORTED: dict[str, list[ShardingType]] = {
    # Row-wise needs a reduce-scatter of pooled sums that TorchRec does not have for EmbeddingBagCollection on CPU.
    "cpu": ["table_wise", "column_wise"],
    "cuda": ["table_wise", "column_wise", "row_wise", "table_row_wise"],
}


class ShardingConfig(Settings):
    types: list[ShardingType] = Field(
        [],
        description="what the planner may use; empty: all that the device supports. Never data_parallel: "
        "replicated tables cannot have their optimizer in the backward pass",
    )
    memory_gib: float | None = Field(
        None, gt=0, le=2**20, description="memory for tables on one rank in GiB; None: TorchRec's default"
    )


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


def plan_sharding(
    model: nn.Module, tables: Sequence[str], config: ShardingConfig, topology: Topology, fused: bool, batch_size: int
) -> ShardingPlan:
    """TorchRec's plan for ``model``, the same on every rank. Collective when a process group is initialised.

    Args:
        tables: names of the model's tables.
        fused: the tables' optimizer runs in the backward pass; otherwise every rank holds every table.
        batch_size: rows of one rank's batch, for the planner's estimates.

    Raises:
        ValueError: a sharding type the device does not have, or tables that do not fit these ranks.
    """
    device_type = topology.compute_device
    allowed = config.types or SUPPORTED[device_type]
    for sharding_type in allowed:
        if sharding_type not in SUPPORTED[device_type]:
            raise ValueError(
                f"sharding.types: {sharding_type!r} is not supported on {device_type}; "
                f"use {', '.join(SUPPORTED[device_type])}"
            )
    constraint = ParameterConstraints(sharding_types=list(allowed), compute_kernels=["fused"])
    if not fused:
        if config.types:
            raise ValueError(
                f"sharding.types={config.types} has no effect: adam on CPU keeps every table on every rank; "
                "remove it, or choose embeddings.optimizer rowwise_adagrad, adagrad or sgd"
            )
        constraint = ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["dense"])
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=batch_size, constraints=dict.fromkeys(tables, constraint)
    )
    # TorchRec's own collective_plan leaves the other ranks waiting when rank 0 finds no plan.
    found: list[ShardingPlan | str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [planner.plan(model, [EmbeddingBagCollectionSharder()])]
        except PlannerError as error:
            found = [str(error).strip().splitlines()[0]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise ValueError(
            f"no sharding plan for {len(tables)} tables on {topology.world_size} {device_type} ranks: "
            f"{found[0]} Use more ranks, a smaller embeddings.dim, or raise sharding.memory_gib if the ranks have "
            "more memory"
        )
    return found[0]


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device) -> DistributedModelParallel:
    """``model`` with its tables sharded by ``plan`` and everything else replicated (DDP)."""
    return DistributedModelParallel(model, device=device, plan=plan, sharders=[EmbeddingBagCollectionSharder()])
