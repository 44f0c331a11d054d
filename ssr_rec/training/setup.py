"""Joins the job's ranks and refuses what the device or the dataset cannot do."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import torch.distributed as dist

from ssr_rec.common.errors import UserError
from ssr_rec.common.heap import keep_freed_memory
from ssr_rec.config.losses import CrossEntropyConfig, LogNormalConfig
from ssr_rec.config.training import OF_NUMBERS, TrainConfig
from ssr_rec.data.schema import Schema
from ssr_rec.training.own_metrics import check_own_metrics


def start_process_group(device: str) -> torch.device:
    """Join the job's ranks (gloo on CPU, NCCL on CUDA), or be the only one when no launcher set RANK.

    On CPU the process keeps memory that it frees (``keep_freed_memory``).
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch finds no GPU here; use --device=cpu or auto")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return chosen


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Refuse what the device cannot do, and switch on TF32 where it is wanted.

    Raises:
        UserError: names the key and the fix.
    """
    if config.pipeline == "prefetch":
        if device.type != "cuda":
            # Without CUDA streams TorchRec's prefetch_embeddings fetches nothing and the forward pass finds no input.
            raise UserError(
                f"train.pipeline: prefetch needs CUDA streams and FBGEMM's row cache, and this is {device.type}; "
                "use sparse_dist"
            )
        if config.skip_bad_steps:
            raise UserError(
                f"train.skip_bad_steps={config.skip_bad_steps} is not for train.pipeline: prefetch; use sparse_dist"
            )
    if config.tf32:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError("train.tf32: only NVIDIA GPUs from A100 (compute capability 8.0) on have TF32; remove it")
        torch.set_float32_matmul_precision("high")


def check_train_config(config: TrainConfig, schema: Schema) -> None:
    """Refuse settings that name labels or groups the dataset does not have."""
    named: dict[str, list[Any]] = {
        "task_weights": [*config.task_weights],
        "losses": [*config.losses],
        "monitor_task": [config.monitor_task],
    }
    for key, names in named.items():
        known = config.measured(schema.labels) if key == "monitor_task" else schema.labels
        for name in {*names} - {*known, None}:
            raise UserError(f"train.{key} names {name!r}; the labels are {', '.join(known)}")
    _check_entire_space(config, schema)
    _check_losses(config, schema)
    if not any(config.task_weights.get(label, 1.0) for label in schema.labels):
        raise UserError(f"train.task_weights gives every label of {', '.join(schema.labels)} 0; leave one above it")
    _check_monitor(config, schema)
    check_own_metrics(config, schema)
    if schema.has_weights and config.accumulate > 1:
        raise UserError(
            f"train.accumulate={config.accumulate}: dataset {schema.name!r} has weights or missing labels, and a group "
            "of batches would be another mean than one batch of their rows; set it to 1"
        )
    _check_ranking(config, schema)


def _check_entire_space(config: TrainConfig, schema: Schema) -> None:
    """Refuse products of labels that there are not, or of one that is observed on other rows than those of the other.

    Where a click does not say what came of it, it is left out and the rows without a click are not, so that the product
    would be learned too low.

    Raises:
        UserError: names the labels and the fix.
    """
    for label, before in config.entire_space.items():
        for name in (label, before):
            if name not in schema.labels:
                raise UserError(f"train.entire_space names {name!r}; the labels are {', '.join(schema.labels)}")
            if schema.number(name) is not None:
                raise UserError(f"train.entire_space: {name!r} is a number, and products are of probabilities")
        if (loss := config.losses.get(label, CrossEntropyConfig())) != CrossEntropyConfig():
            raise UserError(
                f"train.losses.{label}: {loss.name}, but train.entire_space trains {label!r} by the cross-entropy of "
                "its product alone; leave one of them out"
            )
        if before in config.entire_space or label == before:
            raise UserError(f"train.entire_space: {label!r} follows {before!r}, which must be no product itself")
        task = schema.preparation.get("tasks", {}).get(label) or {"where": f"{before} = 1"}
        is_it = re.fullmatch(rf'"?{re.escape(before)}"?\s*(=\s*1|>\s*0|>=\s*1|!=\s*0)', (task["where"] or "").strip())
        if label not in schema.missing_labels or is_it is None or task.get("missing"):
            raise UserError(
                f"train.entire_space: {label!r} follows {before!r}, but dataset {schema.name!r} has it on other rows; "
                f'prepare the log with tasks: {{{label}: {{where: "{before} = 1"}}}} alone in its spec'
            )


def _check_losses(config: TrainConfig, schema: Schema) -> None:
    """Refuse losses that do not fit the rows: the negative ones left out, or numbers below 0 on days added later."""
    for label, loss in config.losses.items():
        number = schema.number(label)
        if isinstance(loss, LogNormalConfig) and number is not None and number.low < 0:
            raise UserError(
                f"train.losses.{label}: log_normal: it is for labels from 0 on, and {label!r} goes down to "
                f"{number.low:g}; use mse"
            )
        if schema.negatives < 1 and loss != CrossEntropyConfig():
            raise UserError(
                f"train.losses.{label}: dataset {schema.name!r} has {schema.negatives:g} of its negative rows, which "
                "is corrected for in cross_entropy without smoothing alone; use that, or prepare all rows"
            )


def _check_monitor(config: TrainConfig, schema: Schema) -> None:
    """Refuse to choose the best evaluation by what no task that counts has."""
    monitor = config.monitor
    trained = [label for label in schema.labels if config.task_weights.get(label, 1.0)]
    tasks = [config.monitor_task] if config.monitor_task is not None else trained
    if not any((schema.number(task) is not None) == (monitor in OF_NUMBERS) for task in tasks):
        kind, fix = ("binary", "auc") if monitor in OF_NUMBERS else ("numbers", "rmse")
        raise UserError(
            f"train.monitor: {monitor}, but {', '.join(tasks)} {'are' if len(tasks) > 1 else 'is'} {kind}: use {fix}"
        )
    if monitor == "gauc" and schema.group_id is None:
        raise UserError(f"train.monitor: gauc needs a group id, which dataset {schema.name!r} does not have; use auc")


def _check_ranking(config: TrainConfig, schema: Schema) -> None:
    """Refuse measures of rankings where there is nothing to rank."""
    if not config.ranking_metrics:
        return
    if schema.together is None and schema.group_id is None:
        raise UserError(
            f"train.ranking_metrics: dataset {schema.name!r} has no groups to rank within; prepare the log with "
            "together or group_id, or remove them"
        )
    if not set(schema.labels) - set(schema.number_names):
        raise UserError("train.ranking_metrics are of binary labels, and there are numbers alone; remove them")


def share_cores() -> int:
    """Give this process its part of the host's cores; return how many processes the launcher runs on the host."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    return local_world_size
