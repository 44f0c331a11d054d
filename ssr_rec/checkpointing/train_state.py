"""Turns what a run is in the middle of into tensors and JSON values, and puts them back into a freshly built run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.checkpointing.format import INFO_FILE, last_line, read_checkpoint, stored_tensors
from ssr_rec.checkpointing.manager import Contents
from ssr_rec.checkpointing.progress import Fitted
from ssr_rec.common.errors import UserError
from ssr_rec.data.day_stream import Course
from ssr_rec.data.schema import Schema
from ssr_rec.metrics.running import RunningAUC
from ssr_rec.model.ctr_model import running_statistics

MODEL, OPTIMIZER = "model/", "optimizer/"
"""Prefixes of the names; what only one rank has is under ``rank<R>/``."""
RUNNING = ("logits", "labels", "weights")
"""Names of the rows behind the running AUC; weights only where rows have them."""


def model_tensors(model: nn.Module) -> dict[str, Tensor | ShardedTensor]:
    """Return the weights and buffers; the tensors are the model's own."""
    return {MODEL + name: value for name, value in model.state_dict().items()}


def optimizer_tensors(optimizer: CombinedOptimizer) -> dict[str, Tensor | ShardedTensor]:
    """Return the state of every parameter's optimizer; the tensors are the optimizer's own.

    Dense optimizers make their state at the first step; reading a checkpoint needs it before
    (``initialise_optimizer``), or it would be left out without an error.
    """
    tensors = {}
    for parameter, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert isinstance(value, (Tensor, ShardedTensor)), f"{parameter}: {key} is {type(value).__name__}"
            tensors[f"{OPTIMIZER}{parameter}/{key}"] = value
    return tensors


def initialise_optimizer(optimizer: CombinedOptimizer) -> None:
    """Create the state of the dense optimizers by a step that moves nothing: without gradient, rate or decay."""
    groups = list(optimizer.param_groups)
    settings = [{key: group[key] for key in ("lr", "weight_decay") if key in group} for group in groups]
    for group, kept in zip(groups, settings, strict=True):
        group.update(dict.fromkeys(kept, 0.0))
    for name, part in optimizer.optimizers:
        if name != "fused":  # FBGEMM's state is there from the start
            part.init_state()
    optimizer.zero_grad(set_to_none=True)
    for group, kept in zip(groups, settings, strict=True):
        group.update(kept)


def rank_tensors(model: nn.Module, running: RunningAUC) -> dict[str, Tensor]:
    """Return what is this rank's alone: random states, batch norms' statistics, the rows behind the running AUC."""
    prefix = f"rank{dist.get_rank()}/"
    tensors = {prefix + name: buffer for name, buffer in running_statistics(model).items()}
    tensors[prefix + "rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[prefix + "rng_cuda"] = torch.cuda.get_rng_state()
    if (rows := running.rows()) is not None:
        tensors |= dict(zip((prefix + name for name in RUNNING), rows, strict=False))
    return tensors


def weights_now(model: nn.Module, fitted: Fitted, dataset_id: str, config: Mapping[str, Any]) -> Contents:
    """Return a checkpoint of the weights alone; its tensors are the model's own, ``config`` is JSON values."""
    return model_tensors(model), {
        "kind": "weights",
        "step": fitted.steps,
        "world_size": dist.get_world_size(),
        "dataset_id": dataset_id,
        "config": config,
    }


def training_now(
    model: nn.Module,
    optimizer: CombinedOptimizer,
    running: RunningAUC,
    fitted: Fitted,
    train: Course,
    config: Mapping[str, Any],
) -> Contents:
    """Return a training checkpoint; its tensors are the run's own, ``config`` is the run's as JSON values."""
    tensors = {**model_tensors(model), **optimizer_tensors(optimizer), **rank_tensors(model, running)}
    return tensors, {
        "kind": "training",
        "step": fitted.steps,
        "world_size": dist.get_world_size(),
        "fitted": asdict(fitted),
        "position": train.position(),
        "config": config,
    }


def restore(
    folder: Path,
    info: Mapping[str, Any],
    model: nn.Module,
    optimizer: CombinedOptimizer,
    running: RunningAUC,
    train: Course,
    seed: int,
) -> Fitted:
    """Put a training checkpoint, written by any number of ranks, into a freshly built run. Collective.

    Returns:
        what had been done by then.

    Raises:
        UserError: the checkpoint does not fit the model, or its position would mean other rows.
    """
    here = train.position()
    for key, value in here.items():
        if not _continues(key, there := info["position"].get(key), value, train.schema):
            if key == "dataset_id" and isinstance(there, str) and there in train.schema.known_ids:
                raise UserError(
                    f"{folder}: since then the vocabularies of dataset {train.schema.name!r} have been extended, so "
                    "its tables are larger than the checkpoint's; begin a new run with --warm_start and "
                    "--warm_start_optimizer=true, which keep the old rows, on the days that are left (data.days)"
                )
            raise UserError(
                f"{folder}: stopped in the middle of {key}={there}, this run has {value}: the "
                "same step would mean other rows. Resume with the same data, batch size, seed and data.num_lanes, or "
                "start from its weights alone with --warm_start"
            )
    fitted = _fitted(info, folder)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    initialise_optimizer(optimizer)
    tensors = {**model_tensors(model), **optimizer_tensors(optimizer)}
    own = {}
    if info["world_size"] == world_size:
        stored = stored_tensors(folder)
        own = {n: torch.empty(s, dtype=d) for n, (s, d) in stored.items() if n.startswith(f"rank{rank}/")}
    read_checkpoint({**tensors, **own}, folder)
    model.load_state_dict({name.removeprefix(MODEL): v for name, v in tensors.items() if name.startswith(MODEL)})
    optimizer.set_optimizer_step(info["step"] + fitted.steps_before)
    if own:
        try:
            _restore_own({name.removeprefix(f"rank{rank}/"): value for name, value in own.items()}, model, running)
        except Exception as error:  # torch raises what it likes about a state that is none
            raise UserError(f"{folder}: damaged: the state of rank {rank}: {last_line(error)}") from None
    else:
        # Other ranks than those that drew before: any draws do, as long as no two ranks' are the same.
        torch.manual_seed(seed * 1_000_003 + rank + 7919 * info["step"])
    return fitted


def _continues(key: str, there: Any, here: Any, schema: Schema) -> bool:
    """Return whether steps up to a checkpoint mean the same rows here: as it was, or with days added after them."""
    if key == "dataset_id":
        return isinstance(there, str) and there in schema.same_tables_ids
    if key == "num_rows" and isinstance(here, Mapping) and isinstance(there, Mapping):
        return list(here.items())[: len(there)] == list(there.items())
    return bool(there == here)


def _restore_own(own: Mapping[str, Tensor], model: nn.Module, running: RunningAUC) -> None:
    """Put back what ``rank_tensors`` took."""
    for name, buffer in running_statistics(model).items():
        buffer.copy_(own[name])
    torch.set_rng_state(own["rng"])
    if torch.cuda.is_available() and "rng_cuda" in own:
        torch.cuda.set_rng_state(own["rng_cuda"])
    if "logits" in own:
        device = next(model.parameters()).device
        running.update(*(own[name].to(device) for name in RUNNING if name in own))


def _fitted(info: Mapping[str, Any], folder: Path) -> Fitted:
    values, problem = info["fitted"], None
    known = asdict(Fitted())
    for name, value in values.items():
        kind = (int, float) if isinstance(known.get(name), float) else type(known.get(name))
        if name not in known or not isinstance(value, kind):
            problem = f"fitted.{name}={value}"
    if values.get("best") and not isinstance(values["best"].get("step"), int):
        problem = f"fitted.best.step={values['best'].get('step')}"
    if problem is None and values.get("steps") != info["step"]:
        problem = f"fitted.steps={values.get('steps')} at step {info['step']}"
    if problem is not None:
        raise UserError(f"{folder / INFO_FILE}: damaged: {problem[:300]} is not what a run writes")
    return Fitted(**values)
