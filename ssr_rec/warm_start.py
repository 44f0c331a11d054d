"""Weights alone out of a checkpoint: the best of a run for its test, or those of an older run to begin with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from ssr_rec.checkpoint import INFO_FILE, read_checkpoint, stored_tensors, verify
from ssr_rec.run_folder import CHECKPOINTS_FOLDER
from ssr_rec.saver import BEST, list_checkpoints
from ssr_rec.snapshot import MODEL, model_tensors

ROWS_OF_IDS = "._mch_sorted_raw_ids"
"""Name's end of the ids that have a row of a managed table (``ssr_rec/managed.py``)."""


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read all weights of ``model`` from a checkpoint, whatever world size wrote it. Collective.

    Raises:
        ValueError: not a good checkpoint, or one of another model.
    """
    verify(folder)
    tensors = model_tensors(model)
    read_checkpoint(tensors, folder)
    model.load_state_dict({name.removeprefix(MODEL): value for name, value in tensors.items()})


def warm_start(model: nn.Module, source: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Begin with the weights of another run wherever they fit. Collective.

    A tensor fits when name and size are the same; a table that has more rows now keeps its old ones and has fresh
    ones after them, which is what an extended vocabulary means. Weights of another precision are rounded to this
    model's, to nearest.

    Args:
        source: a checkpoint, or a run folder, of which the best weights are taken.

    Returns:
        ``source`` and the names that were ``loaded``, ``grown`` (with the rows kept), ``fresh`` (not in the
        checkpoint), ``other_size`` and ``unused`` (only in the checkpoint); of those taken, ``other_dtype`` with the
        checkpoint's.

    Raises:
        ValueError: no good checkpoint there, nothing fits, or a weight is too large for this model's precision.
    """
    folder = source
    if not (source / INFO_FILE).exists():
        found = [list_checkpoints(source / CHECKPOINTS_FOLDER, BEST)[:1]]
        dist.broadcast_object_list(found)
        if not found[0]:
            raise ValueError(f"warm_start={source}: neither a checkpoint nor a run folder with best weights")
        folder = found[0][0]
    verify(folder)
    stored_as = stored_tensors(folder)
    stored = {name: size for name, (size, _) in stored_as.items() if name.startswith(MODEL)}
    report: dict[str, Any] = {"source": str(folder), "loaded": [], "grown": {}, "fresh": [], "other_size": []}
    wanted: dict[str, Tensor | ShardedTensor] = {}
    tensors = model_tensors(model)
    for name, value in tensors.items():
        here, there = value.size(), stored.pop(name, None)
        short = name.removeprefix(MODEL)
        if there is None:
            report["fresh"].append(short)
        elif here == there:
            wanted[name] = value
            report["loaded"].append(short)
        elif ".embedding_bags." in name and here[1:] == there[1:] and here[0] > there[0]:
            wanted[name] = first_rows(value, there[0])
            report["grown"][short] = there[0]
        else:
            report["other_size"].append(short)
    report["unused"] = [name.removeprefix(MODEL) for name in stored]
    for name in (*report["fresh"], *report["other_size"], *report["unused"]):
        if name.endswith(ROWS_OF_IDS):
            feature = name.removesuffix(ROWS_OF_IDS).rpartition(".")[2]
            raise ValueError(
                f"warm_start={source}: there and here the ids of feature {feature!r} have other rows, since "
                "embeddings.managed differs; give it the same rows, or leave the feature out"
            )
    if not wanted:
        raise ValueError(
            f"warm_start={source}: nothing in {folder} fits this model; it has {', '.join(report['unused'])}"
        )
    others = {name: stored_as[name][1] for name, value in wanted.items() if stored_as[name][1] != value.dtype}
    report["other_dtype"] = {name.removeprefix(MODEL): str(dtype) for name, dtype in others.items()}
    read = {name: with_dtype(value, others[name]) if name in others else value for name, value in wanted.items()}
    read_checkpoint(read, folder)
    too_large = [name for name in others if not round_into(wanted[name], read[name])]
    problems: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(problems, too_large)
    for name in chain.from_iterable(problems):
        raise ValueError(
            f"warm_start={source}: {name.removeprefix(MODEL)} has values beyond the range of {wanted[name].dtype}; "
            "keep it in fp32 by embeddings.dtypes"
        )
    model.load_state_dict({name.removeprefix(MODEL): value for name, value in tensors.items()})
    counts = [f"{len(report[key])} {text}" for key, text in WORDS.items() if report[key]]
    note(f"warm start from {folder}: " + ", ".join(counts))
    for key in ("grown", "fresh", "other_size", "other_dtype", "unused"):
        if report[key]:
            note(f"  {WORDS[key]}: {', '.join(report[key])}")
    return report


WORDS = {
    "loaded": "tensors as they were",
    "grown": "tables that have grown and keep their old rows",
    "fresh": "tensors not in the checkpoint, left fresh",
    "other_size": "tensors of another size, left fresh",
    "other_dtype": "of these in another precision, rounded",
    "unused": "tensors only in the checkpoint",
}


def first_rows(value: Tensor | ShardedTensor, rows: int) -> Tensor | ShardedTensor:
    """The first rows of a table as a tensor of its own that shares the memory."""
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
    """An empty tensor like ``value``, shards included, of another precision."""
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
