"""Defines the ``sharding`` section of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssr_rec.common.settings import Settings

ShardingType = Literal["table_wise", "column_wise", "row_wise", "table_row_wise"]


Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]


Precision = Literal["fp32", "fp16", "bf16"]


class TableConstraint(Settings):
    """Says what the planner may do with one table, in place of what ``ShardingConfig`` says for all."""

    types: list[ShardingType] = Field([], description="empty: sharding.types")
    kernels: list[Kernel] = Field([], description="empty: sharding.kernels")
    cache_load_factor: float | None = Field(None, gt=0, le=1, description="None: sharding.cache_load_factor")
    min_partition: int | None = Field(
        None, ge=4, multiple_of=4, description="fewest columns of a column-wise shard; None: TorchRec's 128"
    )


class QCommsSettings(Settings):
    """Sets the precision in which pooled embeddings and their gradients travel between ranks."""

    forward: Precision = "fp32"
    backward: Precision = "fp32"


class ShardingConfig(Settings):
    types: list[ShardingType] = Field(
        [],
        description="what the planner may use; empty: all that the device supports. On cpu row_wise is of tables that "
        "sequences read alone, and only where it is named. Never data_parallel: "
        "replicated tables cannot have their optimizer in the backward pass",
    )
    memory_gib: float | None = Field(
        None, gt=0, le=2**20, description="memory for tables on one rank in GiB; None: TorchRec's default"
    )
    kernels: list[Kernel] = Field(
        ["fused"],
        min_length=1,
        description="where tables may be: fused: in the device's memory; fused_uvm: in the host's, read by the GPU; "
        "fused_uvm_caching: in the host's, with the rows in use cached on the GPU",
    )
    cache_load_factor: float | None = Field(
        None, gt=0, le=1, description="share of a fused_uvm_caching table's rows that the GPU caches; None: TorchRec's"
    )
    per_table: dict[str, TableConstraint] = Field({}, description="table -> its own constraints")
    qcomms: QCommsSettings = QCommsSettings()
    plan: str | None = Field(
        None, description="plan file of tools/plan_sharding.py, followed exactly; None: TorchRec's planner decides"
    )
