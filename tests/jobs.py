"""Jobs that tests run on several ranks; importable, so that other processes can."""

import hashlib
import os
import signal
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ssr_rec.checkpointing.format import write_checkpoint
from ssr_rec.checkpointing.train_state import model_tensors
from ssr_rec.checkpointing.warm_rows import Here, Origin
from ssr_rec.checkpointing.warm_start import load_weights, warm_start
from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.model.loss import WeightedCrossEntropy
from ssr_rec.runs.log import RunLog
from ssr_rec.train import train
from ssr_rec.training.datasets import open_reader
from ssr_rec.training.evaluation import evaluate
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.pipeline import build_pipeline
from ssr_rec.training.setup import start_process_group
from ssr_rec.training.stall_watch import Preempted


def train_job(overrides: list[str], config: str | None = None, with_curves: bool = False) -> dict[str, Any]:
    """The report of a run. Its curves would take as long as a small run's training."""
    with nullcontext() if with_curves else mock.patch("ssr_rec.runs.result.draw_curves", lambda *_: None):
        return train(load_config(config, overrides)).values()


def refused_job(overrides: list[str]) -> str:
    """The message with which a run is refused."""
    try:
        train(load_config(None, overrides))
    except ValueError as error:
        return str(error)
    return "not refused"


def refused_jobs(jobs: list[list[str]]) -> list[str]:
    """The messages of runs that are refused, one after the other."""
    return [refused_job(overrides) for overrides in jobs]


def whole_tables(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every table put together from its shards, on rank 0; on others what they hold."""
    tables = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, ShardedTensor):
            tables[key] = value.clone()
            continue
        whole = torch.zeros(value.size())
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            whole[row : row + rows, column : column + columns] = shard.tensor
        dist.all_reduce(whole)
        tables[key] = whole
    return tables


def digests(model: torch.nn.Module) -> dict[str, str]:
    return {key: hashlib.sha256(t.numpy().tobytes()).hexdigest() for key, t in whole_tables(model).items()}


def built_model(overrides: list[str], dataset: str) -> torch.nn.Module:
    config = load_config(None, overrides)
    device = start_process_group(config.device)
    world_size = dist.get_world_size()
    return build_model(config, Schema.read(dataset), device, world_size, world_size)


def initial_digests_job(overrides: list[str], dataset: str) -> dict[str, str]:
    return digests(built_model(overrides, dataset))


def save_job(overrides: list[str], dataset: str, folder: str) -> dict[str, str]:
    model = built_model(overrides, dataset)
    write_checkpoint(model_tensors(model), {"kind": "weights", "step": 1}, Path(folder))
    return digests(model)


def load_job(overrides: list[str], dataset: str, folder: str) -> dict[str, str]:
    model = built_model([*overrides, "--seed=99"], dataset)
    load_weights(model, Path(folder))
    return digests(model)


def plain_loss_job(options: list[str], dataset: str) -> float:
    """The first batch's loss by plain indexing, pandas and the written-out cross-entropy; unshuffled, one lane."""
    model = built_model(options, dataset)
    tables = {key.split(".")[-2]: table for key, table in whole_tables(model).items() if "embedding_bags" in key}
    rows = pd.read_parquet(Path(dataset) / "train" / "00000.parquet").head(64)
    vectors = []
    for name in ("user", "history", "item", "price", "tags"):
        ids = [[v] if np.isscalar(v) else list(v) for v in rows[name]]
        vectors.append(torch.stack([tables[name][i].sum(0) if i else torch.zeros(8) for i in ids]))
    dense = model.module.model.dense
    logits = dense.heads(dense.over_arch(torch.cat(vectors, 1))).detach()
    p = torch.sigmoid(logits)
    y = torch.tensor(rows[["click", "like"]].to_numpy(), dtype=torch.float32)
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean(0)
    return float((cross_entropy[0] + 3 * cross_entropy[1]) / 4)


def extra_tables_job(dataset: str) -> float:
    """Largest difference between a DeepFM's inputs by the sharded tables and by plain indexing."""
    model = built_model(["--over_arch.name=deepfm", "--embeddings.dim=8"], dataset)
    tables = {key.split(".")[-2]: table for key, table in whole_tables(model).items() if "embedding_bags" in key}
    schema = Schema.read(dataset)
    batch = next(iter(open_reader(load_config(None, []), Path(dataset), schema, "test", 0, 1).epoch(0)))
    inputs = model.module.model.dense.concat(model.module.model.tables(batch.sparse))
    vectors: list[list[torch.Tensor]] = [[], []]
    for name in schema.feature_names:
        rows = [ids.tolist() for ids in batch.sparse[name].to_dense()]
        for part, table in enumerate((tables[name], tables[f"{name}@first_order"])):
            empty = torch.zeros(table.shape[1])
            pooled = torch.stack([table[ids].mean(0) if ids else empty for ids in rows])
            # Two tasks: two first-order weights, each the mean of two of the table's four columns.
            halves = torch.stack([pooled[:, :2].mean(1), pooled[:, 2:].mean(1)], 1)
            vectors[part].append(halves if part else pooled)
    differences = [(torch.cat(v, 1) - x).abs().max() for v, x in zip(vectors, inputs, strict=True)]
    return float(max(differences))


def own_optimizer_job(overrides: list[str], dataset: str) -> dict[str, str]:
    """Parameter of over-arch and heads -> class of the optimizer that steps it."""
    model = built_model(overrides, dataset)
    config = load_config(None, overrides)
    combined = build_optimizer(model, config.optimizer, config.embeddings)
    classes = {}
    for _, keyed in combined.optimizers:
        inner = getattr(keyed, "_optimizer", None)
        for name in keyed.params if inner is not None else ():
            assert name not in classes, f"{name} is stepped twice"
            classes[name] = type(inner).__name__
    wanted = [name for name, _ in model.named_parameters() if ".dense." in name]
    assert set(classes) == set(wanted), set(classes) ^ set(wanted)
    return {name.split(".over_arch.")[-1]: kind for name, kind in classes.items()}


def stopped_job(overrides: list[str], step: int) -> str:
    """Training that is asked to stop, as by SIGTERM, once a stage has done ``step`` steps."""
    row = RunLog.__call__

    def stop_here(log: RunLog, figures: dict[str, Any]) -> None:
        row(log, figures)
        if figures["split"] == "train" and figures["step"] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.__call__ = stop_here  # type: ignore[method-assign]
    try:
        train(load_config(None, overrides))
    except Preempted:
        return "preempted"
    finally:
        RunLog.__call__ = row  # type: ignore[method-assign]
    return "finished"


def read_rows_job(overrides: list[str], dataset: str, start: int, stop: int | None) -> list[tuple[Any, ...]]:
    """What this rank reads of the first epoch's steps start:stop: the ids and labels of every row."""
    config = load_config(None, overrides)
    start_process_group(config.device)
    schema = Schema.read(dataset)
    reader = open_reader(config, Path(dataset), schema, "train", dist.get_rank(), dist.get_world_size())
    rows: list[tuple[Any, ...]] = []
    for batch in islice(reader.epoch(0, start), None if stop is None else stop - start):
        columns = [[tuple(ids.tolist()) for ids in batch.sparse[name].to_dense()] for name in schema.feature_names]
        rows += zip(*columns, map(tuple, batch.labels.tolist()), strict=True)
    return rows


def bad_loss_job(overrides: list[str], step: int, value: float, times: int = 1) -> Any:
    """Training in which the loss of rank 1 has ``value`` nats a row at ``times`` steps from ``step`` on.

    Returns:
        the report, or the message with which the run ended.
    """
    plain, calls = WeightedCrossEntropy.forward, count(1)

    def bad(self: WeightedCrossEntropy, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = plain(self, logits, labels)
        if torch.is_grad_enabled() and dist.get_rank() == 1 and step <= next(calls) < step + times:
            return loss * 0 + value * 64
        return loss

    WeightedCrossEntropy.forward = bad  # type: ignore[method-assign]
    try:
        return train(load_config(None, overrides)).values()
    except ValueError as error:
        return str(error)
    finally:
        WeightedCrossEntropy.forward = plain  # type: ignore[method-assign]


def warm_started_job(
    overrides: list[str], dataset: str, source: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report of a warm start (of none: {}) and every whole table by feature; rank 0's are complete."""
    model = built_model(overrides, dataset)
    report = warm_start(model, Path(source), Here(Path(dataset), Schema.read(dataset))) if source else {}
    return report, {key.split(".")[-2]: t.numpy() for key, t in whole_tables(model).items() if "embedding_bags" in key}


def predictions_job(overrides: list[str], dataset: str) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """This rank's logits, labels and groups of the test split by a plain loop, and evaluate() of all ranks."""
    model = built_model(overrides, dataset)
    config, schema = load_config(None, overrides), Schema.read(dataset)
    reader = open_reader(config, Path(dataset), schema, "test", dist.get_rank(), dist.get_world_size())
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    pipeline = build_pipeline(model, optimizer, torch.device("cpu"), config.train)
    found = evaluate(pipeline, model, reader, config.train, lambda _: None)
    model = built_model(overrides, dataset).eval()
    with torch.no_grad():
        outputs = [model(batch)[1] for batch in reader.epoch(0)]
    parts = [torch.cat([output[index] for output in outputs]).numpy() for index in (1, 2, 4)]
    return tuple(parts), found


def trained_vectors_job(
    overrides: list[str], dataset: str, steps: int
) -> tuple[bool, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Whether logits are to the bit those of vectors that stay as given, and the tables before and after some steps."""
    config, schema = load_config(None, overrides), Schema.read(dataset)
    device, ranks = start_process_group(config.device), int(os.environ["WORLD_SIZE"])
    frozen = load_config(None, [*overrides, "--embeddings.trained_vectors=[]", "--sharding.per_table={}"])
    reader = open_reader(config, Path(dataset), schema, "train", dist.get_rank(), ranks)
    models = [build_model(one, schema, device, ranks, ranks, Path(dataset)) for one in (frozen, config)]
    with torch.no_grad():
        first = next(iter(reader.epoch(0)))
        logits = [model.eval()(first)[1][1] for model in models]
    model = models[1].train()
    before = whole_tables(model)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    for batch in islice(reader.epoch(0), steps):
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    after = whole_tables(model)
    return torch.equal(*logits), *({name: t.numpy() for name, t in found.items()} for found in (before, after))


def warm_vectors_job(
    overrides: list[str], dataset: str, source: str, trained_on: str
) -> tuple[dict[str, Any], np.ndarray]:
    """The report of a warm start on weights of the dataset ``trained_on``, and the vectors ``text`` after it."""
    config, schema = load_config(None, overrides), Schema.read(dataset)
    model = build_model(config, schema, start_process_group(config.device), 1, 1, Path(dataset))
    origin = Origin(Schema.read(trained_on).dataset_id, {"path": trained_on})
    with mock.patch("ssr_rec.checkpointing.warm_rows.origin_of", lambda _: origin):
        report = warm_start(model, Path(source), Here(Path(dataset), schema))
    return report, next(t.numpy() for name, t in whole_tables(model).items() if name.endswith(".text.weight"))
