"""Writes and reads a sharding plan as a file: plain JSON that a job follows exactly, or refuses with every difference.

``tools/plan_sharding.py --save`` writes one; ``sharding.plan`` names it. It holds where every shard of every table
lies, and nothing that runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import canonical_json, parse_json, read_text
from ssr_rec.common.settings import Settings, first_problem

MAX_BYTES = 2**28
"""Some two million shards."""
Pair = Annotated[list[Annotated[int, Field(ge=0, le=2**40)]], Field(min_length=2, max_length=2)]
"""Rows and columns."""


class PlannedShard(Settings):
    rank: int = Field(ge=0, lt=2**20)
    offset: Pair
    size: Pair


class PlannedTable(Settings):
    """Describes one table; a replicated one (data_parallel) has no shards."""

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    dtype: Literal["fp32", "fp16"]
    sharding_type: Literal["table_wise", "column_wise", "row_wise", "table_row_wise", "data_parallel"]
    kernel: Literal["dense", "fused", "fused_uvm", "fused_uvm_caching"]
    cache_load_factor: float | None = Field(None, gt=0, le=1)
    shards: list[PlannedShard]


class PlanFile(Settings):
    """Holds a plan and what it is for."""

    format_version: Literal[1] = 1
    kind: Literal["ssr_rec sharding plan"] = "ssr_rec sharding plan"
    device: Literal["cpu", "cuda"]
    world_size: int = Field(ge=1)
    local_world_size: int = Field(ge=1)
    tables: dict[str, PlannedTable] = Field(min_length=1)
    fingerprint: str = ""

    @model_validator(mode="after")
    def _shards_make_up_their_tables(self) -> PlanFile:
        for name, table in self.tables.items():
            problem = _shards_problem(table, self.world_size, self.local_world_size)
            if problem:
                raise UserError(f"tables.{name}: {problem}")
        return self


def _shards_problem(table: PlannedTable, world_size: int, local_world_size: int) -> str | None:
    """Return what is wrong with the shards of a table, if anything."""
    kind, shards = table.sharding_type, table.shards
    if (table.kernel == "dense") != (kind == "data_parallel"):
        return f"kernel {table.kernel} does not go with {kind}"
    if kind == "data_parallel":
        return "a replicated table has no shards" if shards else None
    if not shards:
        return "it has no shards"
    ranks = [shard.rank for shard in shards]
    if max(ranks) >= world_size:
        return f"a shard on rank {max(ranks)} of {world_size} ranks"
    by_rows = kind in ("row_wise", "table_row_wise")
    cut, whole, names = (0, 1, "rows") if by_rows else (1, 0, "columns")
    extent = (table.rows, table.columns)
    if any(shard.offset[whole] or shard.size[whole] != extent[whole] for shard in shards):
        return f"{kind} cuts {names} only, and a shard is not whole otherwise"
    ends = [0, *(shard.offset[cut] + shard.size[cut] for shard in shards)]
    if any(shard.offset[cut] != end for shard, end in zip(shards, ends, strict=False)) or ends[-1] != extent[cut]:
        return f"its shards do not make up its {extent[cut]} {names} one after another"
    if kind == "table_wise" and len(shards) != 1:
        return "a table-wise table has one shard"
    if kind == "row_wise" and ranks != list(range(world_size)):
        return "a row-wise table has one shard on every rank, in their order"
    if kind == "table_row_wise":
        first = ranks[0] - ranks[0] % local_world_size
        if ranks != list(range(first, first + local_world_size)):
            return "the shards of a table-row-wise table are on the ranks of one host, in their order"
    return None


def fingerprint(plan: PlanFile) -> str:
    """Return the fingerprint of everything in the file but itself."""
    values = plan.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(canonical_json(values)).hexdigest()


def write_plan(plan: PlanFile, path: str | Path) -> None:
    sealed = plan.model_copy(update={"fingerprint": fingerprint(plan)})
    Path(path).write_text(json.dumps(sealed.model_dump(mode="json"), indent=1) + "\n")


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan from its file.

    Raises:
        UserError: unreadable, not a plan, or changed since it was written; the message names the file and the entry.
    """
    text = read_text(path, MAX_BYTES, "write one with tools/plan_sharding.py --save")
    try:
        plan = PlanFile.model_validate(parse_json(text))
    except ValidationError as error:
        raise UserError(f"{path}: not a sharding plan: {first_problem(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON of plain values: {error}") from None
    if plan.fingerprint != fingerprint(plan):
        raise UserError(f"{path}: changed since it was written, its fingerprint is another; write it again")
    return plan


def plan_differences(plan: PlanFile, job: PlanFile) -> list[str]:
    """Return everything in which a job is not what the plan is for, equal ones of several tables together.

    Args:
        job: any plan of the job's tables on its ranks.
    """
    found = []
    for key, title in (("device", "device"), ("world_size", "ranks"), ("local_world_size", "ranks on a host")):
        planned, actual = getattr(plan, key), getattr(job, key)
        if planned != actual:
            found.append(f"{title}: planned {planned}, here {actual}")
    by_table: dict[str, list[str]] = {}
    for name in sorted(plan.tables.keys() - job.tables.keys()):
        by_table.setdefault("planned, not in this model", []).append(name)
    for name, table in job.tables.items():
        for difference in _table_differences(plan.tables.get(name), table):
            by_table.setdefault(difference, []).append(name)
    for difference, names in by_table.items():
        found.append(f"table{'s' if len(names) > 1 else ''} {', '.join(names)}: {difference}")
    return found


def _table_differences(planned: PlannedTable | None, table: PlannedTable) -> Iterator[str]:
    if planned is None:
        yield "in this model, not planned"
        return
    for key in ("rows", "columns", "dtype"):
        if getattr(planned, key) != getattr(table, key):
            yield f"{key} planned {getattr(planned, key)}, here {getattr(table, key)}"
    if (planned.kernel == "dense") != (table.kernel == "dense"):
        words = {True: "replicated, with a dense optimizer", False: "sharded, with its optimizer in the backward pass"}
        yield f"planned {words[planned.kernel == 'dense']}; here {words[table.kernel == 'dense']}"


def sharding_plan(plan: PlanFile, paths: Mapping[str, str], prefetch: bool = False) -> ShardingPlan:
    """Return the plan in TorchRec's form.

    Args:
        paths: table -> path of its ``EmbeddingBagCollection`` in the model.
    """
    modules = {path: EmbeddingModuleShardingPlan() for path in paths.values()}
    for name, table in plan.tables.items():
        shards = [
            ShardMetadata(
                shard_offsets=list(shard.offset),
                shard_sizes=list(shard.size),
                placement=placement(plan.device, shard.rank, plan.local_world_size),
            )
            for shard in table.shards
        ]
        caches = table.kernel == "fused_uvm_caching" and (table.cache_load_factor is not None or prefetch)
        modules[paths[name]][name] = ParameterSharding(
            sharding_type=table.sharding_type,
            compute_kernel=EmbeddingComputeKernel(table.kernel).value,
            ranks=[shard.rank for shard in table.shards] or list(range(plan.world_size)),
            sharding_spec=EnumerableShardingSpec(shards) if shards else None,
            cache_params=CacheParams(load_factor=table.cache_load_factor, prefetch_pipeline=prefetch or None)
            if caches
            else None,
        )
    return ShardingPlan(dict(modules))


def job_tables(configs: Sequence[EmbeddingBagConfig], fused: bool) -> dict[str, PlannedTable]:
    """Return a job's tables as a plan describes them; each on one rank, to be compared only."""
    tables = {}
    for config in configs:
        size = [config.num_embeddings, config.embedding_dim]
        tables[config.name] = PlannedTable(
            rows=size[0],
            columns=size[1],
            dtype={"FP32": "fp32", "FP16": "fp16"}[config.data_type.name],  # type: ignore[arg-type]
            sharding_type="table_wise" if fused else "data_parallel",
            kernel="fused" if fused else "dense",
            shards=[PlannedShard(rank=0, offset=[0, 0], size=size)] if fused else [],
        )
    return tables


def plan_of(
    options: Sequence[ShardingOption], device: Literal["cpu", "cuda"], ranks: int, ranks_per_host: int
) -> PlanFile:
    """Return the plan of TorchRec's planner: one option, with ranks, for each table."""
    tables = {}
    for option in options:
        replicated = option.sharding_type == "data_parallel"
        tables[option.name] = PlannedTable(
            rows=option.tensor.shape[0],
            columns=option.tensor.shape[1],
            dtype={4: "fp32", 2: "fp16"}[option.tensor.element_size()],  # type: ignore[arg-type]
            sharding_type=option.sharding_type,
            kernel=option.compute_kernel,
            cache_load_factor=option.cache_load_factor if option.compute_kernel == "fused_uvm_caching" else None,
            shards=[]
            if replicated
            else [
                PlannedShard(rank=shard.rank or 0, offset=list(shard.offset), size=list(shard.size))
                for shard in option.shards
            ],
        )
    return PlanFile(device=device, world_size=ranks, local_world_size=ranks_per_host, tables=tables)
