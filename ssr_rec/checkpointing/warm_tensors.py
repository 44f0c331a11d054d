"""Cuts and rounds tensors, sharded ones too, as a warm start needs them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor


def first_rows(value: Tensor | ShardedTensor, rows: int) -> Tensor | ShardedTensor:
    """Return the first rows of a table as a tensor of its own that shares the memory."""
    if not isinstance(value, ShardedTensor):
        return value[:rows]
    metadata = copy.deepcopy(value.metadata())
    metadata.size = type(metadata.size)([rows, *metadata.size[1:]])
    metadata.shards_metadata = [shard for shard in metadata.shards_metadata if shard.shard_offsets[0] < rows]
    for shard in metadata.shards_metadata:
        shard.shard_sizes[0] = min(shard.shard_sizes[0], rows - shard.shard_offsets[0])
    shards = []
    for local in value.local_shards():
        kept = min(local.metadata.shard_sizes[0], rows - local.metadata.shard_offsets[0])
        if kept > 0:
            part = copy.deepcopy(local.metadata)
            part.shard_sizes[0] = kept
            shards.append(Shard(local.tensor[:kept], part))
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, value._process_group)


def with_dtype(value: Tensor | ShardedTensor, dtype: torch.dtype) -> Tensor | ShardedTensor:
    """Return an empty tensor like ``value``, shards included, of another precision."""
    if not isinstance(value, ShardedTensor):
        return torch.empty_like(value, dtype=dtype)
    metadata = copy.deepcopy(value.metadata())
    metadata.tensor_properties.dtype = dtype
    shards = [Shard(torch.empty_like(s.tensor, dtype=dtype), copy.deepcopy(s.metadata)) for s in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, value._process_group)


def round_into(target: Tensor | ShardedTensor, source: Tensor | ShardedTensor) -> bool:
    """Copy into another precision.

    Returns:
        whether every finite value of this rank is one there, too.
    """
    if isinstance(target, ShardedTensor) and isinstance(source, ShardedTensor):
        all_finite = True
        for into, values in zip(target.local_shards(), source.local_shards(), strict=True):
            all_finite &= round_into(into.tensor, values.tensor)
        return all_finite
    target.copy_(source)
    return bool((target.isfinite() | ~source.isfinite()).all())
