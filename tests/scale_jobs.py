"""Jobs on several ranks for the scale controls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.profiler import ProfilerActivity, profile

from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.train import train
from ssr_rec.training.datasets import open_reader
from tests.jobs import built_model, refused_job, whole_tables


def table_bytes_job(overrides: list[str], dataset: str) -> dict[str, tuple[str, int]]:
    """Table -> dtype and bytes of this rank's shards."""
    found = {}
    for name, value in built_model(overrides, dataset).state_dict().items():
        if isinstance(value, ShardedTensor):
            tensors = [shard.tensor for shard in value.local_shards()]
            found[name.split(".")[-2]] = (str(value.dtype), sum(t.numel() * t.element_size() for t in tensors))
    return found


def exchange_job(overrides: list[str], dataset: str) -> dict[str, Any]:
    """One batch through the tables and back, and what went over the wire.

    Returns:
        ``pooled`` (B, F*D) of this rank's rows; ``moved``: table -> change of its rows by a step, from rank 0;
        ``wire``: [dtype, bytes] of every floating-point all-to-all of forward and backward pass.
    """
    model = built_model(overrides, dataset)
    config, schema = load_config(None, overrides), Schema.read(dataset)
    reader = open_reader(config, Path(dataset), schema, "train", dist.get_rank(), dist.get_world_size())
    batch = next(iter(reader.epoch(0)))
    before = {name: table for name, table in whole_tables(model).items() if "embedding_bags" in name}
    plain, wire = dist.all_to_all_single, []

    def recorded(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if input.is_floating_point():
            wire.append((str(input.dtype), input.numel() * input.element_size()))
        return plain(output, input, *args, **kwargs)

    dist.all_to_all_single = recorded
    try:
        embeddings = model.module.model.tables(batch.sparse)
        pooled = torch.cat(model.module.model.dense.concat(embeddings), 1)
        # Gradients as of a mean over the rows, some of them below fp16's normal numbers.
        weights = torch.linspace(1e-4, 1, pooled.shape[1]) * dist.get_world_size() / batch.global_rows
        (pooled * weights).sum().backward()
    finally:
        dist.all_to_all_single = plain
    moved = {name: table - before[name] for name, table in whole_tables(model).items() if name in before}
    return {
        "pooled": pooled.detach().numpy(),
        "moved": {name.split(".")[-2]: table.numpy() for name, table in moved.items()},
        "wire": wire,
    }


def reductions_job(overrides: list[str]) -> tuple[int, int]:
    """All-reduces of DDP in a training, and its steps."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        report = train(load_config(None, overrides))
    reduced = [e for e in profiled.events() if e.name == "gloo:all_reduce"]
    return len(reduced), report.steps or 0


def elsewhere_job(overrides: list[str], folders: list[str]) -> str:
    """``refused_job`` of ranks with working directories of their own, as nodes without a shared disk have."""
    os.chdir(folders[int(os.environ["RANK"])])
    return refused_job(overrides)
