"""Jobs that measure on real ranks what a plan says."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.train import train
from ssr_rec.training.setup import start_process_group

Shard = tuple[str, tuple[int, int], tuple[int, int]]


def measured_job(overrides: list[str], dataset: str) -> dict[str, Any]:
    """Bytes of the tensors that this rank's tables and their optimizer really have, and where the shards lie."""
    config = load_config(None, overrides)
    device = start_process_group(config.device)
    world_size = dist.get_world_size()
    model = build_model(config, Schema.read(dataset), device, world_size, world_size)
    weights = state = 0
    shards: list[Shard] = []
    for key, value in model.state_dict().items():
        if ".embedding_bags." not in key:
            continue
        name = key.split(".embedding_bags.")[1].removesuffix(".weight")
        if not isinstance(value, ShardedTensor):
            weights += value.nbytes
            shards.append((name, (0, 0), tuple(value.shape)))
            continue
        for shard in value.local_shards():
            weights += shard.tensor.numel() * shard.tensor.element_size()
            shards.append((name, tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)))
    for values in model.fused_optimizer.state_dict()["state"].values():
        for tensor in values.values():
            pieces = [s.tensor for s in tensor.local_shards()] if isinstance(tensor, ShardedTensor) else [tensor]
            state += sum(piece.numel() * piece.element_size() for piece in pieces if torch.is_tensor(piece))
    return {"weights": weights, "state": state, "shards": sorted(shards)}


def refusal_job(overrides: list[str], dataset: str) -> str:
    """The message with which a run's plan is refused."""
    config = load_config(None, overrides)
    device = start_process_group(config.device)
    world_size = dist.get_world_size()
    try:
        build_model(config, Schema.read(dataset), device, world_size, world_size)
    except ValueError as error:
        return str(error)
    return "not refused"


def losses_job(overrides: list[str]) -> dict[str, Any]:
    """The report of a training."""
    return train(load_config(None, overrides)).values()
