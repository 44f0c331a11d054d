"""Training with weights of rows and with masked labels: the loss, its gradients, and whole runs against other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss

from ssr_rec.checkpointing.format import stored_tensors
from ssr_rec.data.schema import NOT_OBSERVED, WEIGHT_COLUMN, Schema, Split
from ssr_rec.data.shards import arrow_schema, write_shards
from ssr_rec.model.loss import MeanLoss
from ssr_rec.runs.folder import read_metrics
from tests.conftest import FEATURES, draw_rows
from tests.jobs import refused_job, train_job
from tests.ranks import run_ranks

RUN = [
    *("--over_arch={name: mlp, hidden: [8]}", "--embeddings.dim=4", "--embeddings.learning_rate=0.05"),
    *("--optimizer.learning_rate=0.01", "--train.eval_every=null", "--train.log_every=1"),
    *("--data.shuffle=false", "--checkpoint.every_minutes=null"),
]


def loss_of(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    x = logits.clone().requires_grad_()
    loss = MeanLoss([1.0, 3.0])(x, labels, weights, len(x))
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad


def drawn(rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    logits, weights = torch.randn(rows, 2, generator=rng), torch.rand(rows, 2, generator=rng) * 3
    return logits, (torch.rand(rows, 2, generator=rng) < 0.4).float(), weights


def test_the_loss_is_that_of_scikit_learn():
    logits, labels, weights = drawn()
    p = logits.double().sigmoid().numpy()
    of_tasks = [log_loss(labels[:, t], p[:, t], sample_weight=weights[:, t]) for t in (0, 1)]
    assert loss_of(logits, labels, weights)[0] == pytest.approx((of_tasks[0] + 3 * of_tasks[1]) / 4, rel=1e-6)


def test_a_weight_of_two_is_the_row_twice_and_of_zero_its_absence():
    logits, labels, _ = drawn()
    weights = torch.ones(40, 2)
    weights[:10], weights[30:] = 2, 0
    order = [*range(10), *range(30)]
    loss, gradient = loss_of(logits, labels, weights)
    plain, of_copies = loss_of(logits[order], labels[order], None)
    assert loss == pytest.approx(plain, rel=1e-6)
    gathered = torch.zeros_like(gradient).index_add(0, torch.tensor(order), of_copies)
    torch.testing.assert_close(gradient, gathered, atol=1e-6, rtol=1e-6)


def test_ones_are_no_weights_and_a_task_without_rows_adds_nothing():
    logits, labels, _ = drawn()
    one = MeanLoss([2.0])
    ones = one(logits[:, :1], labels[:, :1], torch.ones(40, 1), 40)
    assert ones.item() == one(logits[:, :1], labels[:, :1], None, 40).item()
    masked = torch.ones(40, 2)
    masked[:, 1] = 0
    loss, gradient = loss_of(logits, labels, masked)
    assert loss == pytest.approx(one(logits[:, :1], labels[:, :1], None, 40).item() / 4, rel=1e-6)
    assert not gradient[:, 1].any()


def write(folder: Path, splits: dict[str, pa.RecordBatch], **more: Any) -> Path:
    """A dataset of the tiny features with the given rows."""
    schema = Schema(
        name="tiny", dataset_id="x", features=FEATURES, labels=["click", "like"], group_id="user", splits={}
    )
    schema = schema.model_copy(update=more)
    found = {
        name: Split(
            num_rows=rows.num_rows,
            positive_rate={"click": 0.5, "like": 0.5},
            shards=write_shards([rows], arrow_schema(schema), folder, name, 64),
        )
        for name, rows in splits.items()
    }
    schema.model_copy(update={"splits": found}).write(folder)
    return folder


def with_column(rows: pa.RecordBatch, name: str, values: np.ndarray) -> pa.RecordBatch:
    if name in rows.schema.names:
        return rows.set_column(rows.schema.names.index(name), name, pa.array(values))
    return rows.append_column(name, pa.array(values))


def trained(jobs: list[list[str]]) -> list[dict[str, Any]]:
    """The reports of runs, one after the other."""
    return [train_job(options) for options in jobs]


@pytest.fixture(scope="module")
def parts() -> dict[str, pa.RecordBatch]:
    rng = np.random.default_rng(4)
    return {name: draw_rows(count, rng) for name, count in (("train", 600), ("validation", 200), ("test", 200))}


def losses(runs: Path, name: str, split: str = "train") -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(runs / name / "metrics.jsonl") if row["split"] == split])


def test_runs_with_weights_and_masks_equal_runs_of_the_rows_that_count(parts, tmp_path):
    """Weighted rows against repeated ones, masked ones against filtered ones; equal batches are equal to the bit."""

    def options(name: str, batch: int, *more: str) -> list[str]:
        lanes = 2 if name == "odd" else 1
        data = [
            f"--data.num_lanes={lanes}",
            f"--data.path={tmp_path}/{name}",
            f"--runs={tmp_path}/runs",
            f"--name={name}",
        ]
        return [*RUN, *data, f"--train.batch_size={batch}", f"--train.eval_batch_size={2 * batch}", *more]

    rng = np.random.default_rng(8)
    plain = {name: rows.slice(0, rows.num_rows // 2) for name, rows in parts.items()}
    junk = {name: rows.slice(rows.num_rows // 2) for name, rows in parts.items()}

    def mixed(name: str, order: np.ndarray, label: str) -> pa.RecordBatch:
        rows = pa.Table.from_batches([plain[name], junk[name]]).combine_chunks().to_batches()[0]
        seen = np.arange(rows.num_rows) < plain[name].num_rows
        labels = np.where(seen, rows.column(label).to_numpy(), NOT_OBSERVED).astype(np.int8)
        return with_column(rows, label, labels).take(pa.array(order))

    def alternating(count: int) -> np.ndarray:
        return np.arange(count).reshape(2, -1).T.ravel()

    write(tmp_path / "plain", plain)
    behind = {name: mixed(name, np.arange(rows.num_rows), "click") for name, rows in parts.items()}
    write(tmp_path / "behind", behind, missing_labels=["click"])
    between = {name: mixed(name, alternating(rows.num_rows), "click") for name, rows in parts.items()}
    write(tmp_path / "between", between, missing_labels=["click"])
    twice = {name: rows.take(pa.array(np.repeat(np.arange(rows.num_rows), 2))) for name, rows in plain.items()}
    write(tmp_path / "twice", twice)
    doubled = {
        name: with_column(rows, WEIGHT_COLUMN, np.full(rows.num_rows, 2, np.float32)) for name, rows in plain.items()
    }
    write(tmp_path / "doubled", doubled, weight="w")
    odd = {
        name: with_column(r, WEIGHT_COLUMN, rng.gamma(1, 1, r.num_rows).astype(np.float32)) for name, r in parts.items()
    }
    write(tmp_path / "odd", odd, weight="w")
    one = "--data.labels=[click]"
    jobs = [options("plain", 60, one), options("behind", 60, one, "--train.max_steps=5")]
    jobs += [options("between", 120, one), options("twice", 120), options("doubled", 60), options("odd", 60)]
    reports = dict(
        zip(("plain", "behind", "between", "twice", "doubled", "odd"), run_ranks(trained, 1, jobs)[0], strict=True)
    )
    runs = tmp_path / "runs"
    assert losses(runs, "plain").tolist() == losses(runs, "behind").tolist()
    np.testing.assert_allclose(losses(runs, "between"), losses(runs, "plain"), rtol=1e-6)
    np.testing.assert_allclose(losses(runs, "doubled"), losses(runs, "twice"), rtol=1e-6)
    for one_run, other in (("between", "plain"), ("behind", "plain"), ("doubled", "twice")):
        np.testing.assert_allclose(losses(runs, one_run, "validation"), losses(runs, other, "validation"), rtol=1e-6)
        for task, wanted in reports[other]["test"].items():
            assert reports[one_run]["test"][task] == pytest.approx(wanted, rel=1e-5)
    bounded = [*options("odd", 60, "--train.metrics=bounded"), "--name=bounded"]
    two = [*options("odd", 60), "--name=two", "--checkpoint.every_steps=4"]
    run_ranks(trained, 2, [bounded, two])
    for name in ("bounded", "two"):
        np.testing.assert_allclose(losses(runs, name), losses(runs, "odd"), rtol=1e-5)
        np.testing.assert_allclose(losses(runs, name, "validation"), losses(runs, "odd", "validation"), rtol=1e-5)
    newest = sorted((runs / "two" / "checkpoints").glob("step-*"))[-1]
    assert {f"rank{rank}/weights" for rank in (0, 1)} <= set(stored_tensors(newest))
    said = run_ranks(refused_job, 1, options("odd", 60, "--train.accumulate=2", "--name=refused"))[0]
    assert "train.accumulate=2: dataset 'tiny' has weights or missing labels" in said
