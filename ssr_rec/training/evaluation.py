"""Runs batches through the pipeline, and computes the measures of a split."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from ssr_rec.data.batch import Batch, row_keys
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.data.value_columns import ValueColumn, ids_of
from ssr_rec.metrics.by_value import MetricsByValue
from ssr_rec.metrics.links import Link
from ssr_rec.metrics.ranking_fold import RankingMetrics
from ssr_rec.metrics.split_metrics import Further, fold_metrics
from ssr_rec.training.own_metrics import own_metrics


class EvaluationConfig(Protocol):
    """Names the part of ``TrainConfig`` that evaluations follow."""

    @property
    def metrics(self) -> str: ...
    @property
    def metrics_rows(self) -> int: ...
    @property
    def extra_metrics(self) -> Sequence[str]: ...
    @property
    def ranking_metrics(self) -> Sequence[str]: ...
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


class _Noted(NamedTuple):
    """Holds what measures of a batch need besides the pipeline's output: keys, groups and values of its rows (B,)."""

    keys: Tensor
    groups: Tensor | None
    values: Tensor | None


def _noting(batches: Iterator[Batch], noted: deque[_Noted], by: ValueColumn | None) -> Iterator[Batch]:
    """Pass on the batches, which a pipeline reads some steps ahead, and note their rows."""
    for batch in batches:
        groups = batch.group_ids if batch.together is None else batch.together
        values = None if by is None else ids_of(batch.sparse, by.name).clone()
        noted.append(_Noted(row_keys(*batch.inputs), groups, values))
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
        ``loss`` (mean over labels of logloss, nats per row, and of numbers of the squared error over their variance in
        training), ``tasks`` (label -> metric -> value) and ``metrics`` (exact or bounded); with ``deciles`` also these,
        label -> what ``metrics.reliability.deciles`` returns. Of a reader ``by`` a column, ``by_value``: binary label
        -> what ``metrics.by_value.measures_by_value`` returns.
    """
    labels, by = reader.schema.labels, reader.by
    further = Further(_links(model) if reader.schema.numbers else {}, own_metrics(config.extra_metrics))
    metrics = fold_metrics(config.metrics, config.metrics_rows, reader.num_rows, config.measured(labels), further)
    ranking = _ranking(config, reader.schema, metrics.mode)
    binary = _binary(config, reader.schema)
    by_value = MetricsByValue(metrics.mode, list(binary), by.names) if by is not None else None
    model.eval()
    batches = reader.epoch(0)
    noted: deque[_Noted] = deque()
    with torch.no_grad():
        for number, output in enumerate(run_steps(pipeline, _noting(batches, noted, by))):
            _, logits, outcomes, weights, groups = output
            beat(f"batch {number} of the evaluation")
            keys, lists, values = noted.popleft()
            metrics.update(logits, outcomes, groups, keys, weights)
            if ranking is not None and lists is not None:
                ranking.update(logits, outcomes, lists, keys, weights)
            if by_value is not None and values is not None:
                columns = list(binary.values())
                of_tasks = None if weights is None else weights[:, columns]
                by_value.update(logits[:, columns], outcomes[:, columns], values, keys, of_tasks)
    batches.close()
    model.train()
    tasks, of_values = metrics.compute(), by_value.compute() if by_value is not None else None
    for task, measures in ((ranking.compute() if ranking is not None else None) or {}).items():
        assert tasks is not None
        tasks[task] |= measures
    found: list[Any] = [None]
    if tasks is not None:
        losses = [_loss(tasks[label], reader.schema.number(label)) for label in labels]
        if reader.schema.has_weights:  # a day may have no row of a task
            losses = [loss for loss in losses if not math.isnan(loss)] or losses
        loss = sum(losses) / len(losses)
        found = [{"loss": loss, "tasks": tasks, "metrics": metrics.mode}]
        if deciles:
            found[0]["deciles"] = metrics.deciles()
        if of_values is not None:
            found[0]["by_value"] = of_values
    dist.broadcast_object_list(found)
    return found[0]


def _links(model: nn.Module) -> dict[str, Link]:
    """Return how the logits of a ``TrainTask``, wrapped or not, become predictions of numbers now."""
    task: Any = getattr(model, "module", model)
    links: dict[str, Link] = task.loss.links()
    return links


def _loss(measures: Mapping[str, float], number: NumberLabel | None) -> float:
    """Return what a task adds to the mean loss of an evaluation."""
    return measures["logloss"] if number is None else (measures["rmse"] / number.std) ** 2


def _ranking(config: EvaluationConfig, schema: Schema, mode: str) -> RankingMetrics | None:
    """Return what measures the rankings that the config asks for, of binary tasks, in the mode of other measures."""
    if not config.ranking_metrics:
        return None
    return RankingMetrics(
        config.ranking_metrics, _binary(config, schema), config.metrics_rows if mode == "bounded" else None
    )


def _binary(config: EvaluationConfig, schema: Schema) -> dict[str, int]:
    """Return the binary tasks that are measured, each with its column among all."""
    tasks = enumerate(config.measured(schema.labels))
    return {name: column for column, name in tasks if schema.number(name) is None}
