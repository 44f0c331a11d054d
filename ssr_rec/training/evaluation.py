"""Runs batches through the pipeline, and computes the measures of a split."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ssr_rec.data.batch import Batch, row_keys
from ssr_rec.data.reader import Reader
from ssr_rec.metrics.split_metrics import fold_metrics


class EvaluationConfig(Protocol):
    """Names the part of ``TrainConfig`` that evaluations follow."""

    @property
    def metrics(self) -> str: ...
    @property
    def metrics_rows(self) -> int: ...
    def measured(self, labels: Sequence[str]) -> list[str]: ...


def run_steps(
    pipeline: TrainPipelineSparseDist,
    batches: Iterator[Any],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Any]:
    """Yield the outputs of the pipeline until ``batches`` ends; the pipeline is empty afterwards.

    Args:
        around: makes the context of each batch.
    """
    while True:
        try:
            with around():
                output = pipeline.progress(batches)
        except StopIteration:
            return
        yield output


def _noting_keys(batches: Iterator[Batch], keys: deque[Tensor]) -> Iterator[Batch]:
    """Pass on the batches, which a pipeline reads some steps ahead, and put the keys of their rows into ``keys``."""
    for batch in batches:
        keys.append(row_keys(batch.sparse, batch.dense))
        yield batch


def evaluate(
    pipeline: TrainPipelineSparseDist,
    model: nn.Module,
    reader: Reader,
    config: EvaluationConfig,
    beat: Callable[[str], None],
    deciles: bool = False,
) -> dict[str, Any]:
    """Return the metrics of a split, the same on every rank and for every world size. Collective.

    Args:
        beat: told of every batch, for the watch over stalled ranks.
        deciles: also compute calibration by decile.

    Returns:
        ``loss`` (mean over labels of logloss, nats per row), ``tasks`` (label -> metric -> value) and ``metrics``
        (exact or bounded); with ``deciles`` also these, label -> what ``metrics.reliability.deciles`` returns.
    """
    labels = reader.schema.labels
    metrics = fold_metrics(config.metrics, config.metrics_rows, reader.num_rows, config.measured(labels))
    model.eval()
    batches = reader.epoch(0)
    keys: deque[Tensor] = deque()
    with torch.no_grad():
        for number, output in enumerate(run_steps(pipeline, _noting_keys(batches, keys))):
            _, logits, outcomes, weights, groups = output
            beat(f"batch {number} of the evaluation")
            metrics.update(logits, outcomes, groups, keys.popleft(), weights)
    batches.close()
    model.train()
    tasks = metrics.compute()
    found: list[Any] = [None]
    if tasks is not None:
        losses = [tasks[label]["logloss"] for label in labels]
        if reader.schema.has_weights:  # a day may have no row of a task
            losses = [loss for loss in losses if not math.isnan(loss)] or losses
        loss = sum(losses) / len(losses)
        found = [{"loss": loss, "tasks": tasks, "metrics": metrics.mode}]
        if deciles:
            found[0]["deciles"] = metrics.deciles()
    dist.broadcast_object_list(found)
    return found[0]
