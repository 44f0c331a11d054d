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
from ssr_rec.common.errors import UserError
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.schema import NOT_OBSERVED, WEIGHT_COLUMN, Schema
from ssr_rec.data.shards import arrow_schema, write_shards
from ssr_rec.data.splits import Split
from ssr_rec.model.loss import EntireSpace, MeanLoss
from ssr_rec.runs.folder import read_metrics
from ssr_rec.training.setup import check_train_config
from tests.conftest import FEATURES, draw_rows
from tests.jobs import refused_job, refused_jobs, train_job
from tests.ranks import run_ranks

RUN = [
    *("--over_arch={name: mlp, hidden: [8]}", "--embeddings.dim=4", "--embeddings.learning_rate=0.05"),
    *("--optimizer.learning_rate=0.01", "--train.eval_every=null", "--train.log_every=1", "--data.num_lanes=1"),
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
    weights[:10], weights[35:] = 2, 0
    order = [*range(10), *range(35)]
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


def options(folder: Path, name: str, batch: int, *more: str) -> list[str]:
    data = [f"--data.path={folder}/{name}", f"--runs={folder}/runs", f"--name={name}"]
    return [*RUN, *data, f"--train.batch_size={batch}", f"--train.eval_batch_size={2 * batch}", *more]


@pytest.mark.slow
def test_runs_with_weights_and_masks_equal_runs_of_the_rows_that_count(parts, tmp_path):
    """Weighted rows against repeated ones, masked ones against filtered ones; equal batches are equal to the bit."""

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
    one = "--data.labels=[click]"
    jobs = [options(tmp_path, "plain", 60, one), options(tmp_path, "behind", 60, one, "--train.max_steps=5")]
    jobs += [options(tmp_path, "between", 120, one), options(tmp_path, "twice", 120), options(tmp_path, "doubled", 60)]
    reports = dict(zip(("plain", "behind", "between", "twice", "doubled"), run_ranks(trained, 1, jobs)[0], strict=True))
    runs = tmp_path / "runs"
    assert losses(runs, "plain").tolist() == losses(runs, "behind").tolist()
    np.testing.assert_allclose(losses(runs, "between"), losses(runs, "plain"), rtol=1e-6)
    np.testing.assert_allclose(losses(runs, "doubled"), losses(runs, "twice"), rtol=1e-6)
    for one_run, other in (("between", "plain"), ("behind", "plain"), ("doubled", "twice")):
        np.testing.assert_allclose(losses(runs, one_run, "validation"), losses(runs, other, "validation"), rtol=1e-6)
        for task, wanted in reports[other]["test"].items():
            assert reports[one_run]["test"][task] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_weighted_losses_are_those_of_any_number_of_ranks_and_any_metrics(parts, tmp_path):
    rng = np.random.default_rng(8)
    odd = {
        name: with_column(r, WEIGHT_COLUMN, rng.gamma(1, 1, r.num_rows).astype(np.float32)) for name, r in parts.items()
    }
    write(tmp_path / "odd", odd, weight="w")
    runs = tmp_path / "runs"
    lanes = ["--data.num_lanes=2", "--checkpoint.every_steps=4"]
    run_ranks(trained, 1, [options(tmp_path, "odd", 60, *lanes)])
    jobs = [[*options(tmp_path, "odd", 60, *lanes), "--name=bounded", "--train.metrics=bounded"]]
    jobs += [[*options(tmp_path, "odd", 60, *lanes), "--name=two"]]
    run_ranks(trained, 2, jobs)
    for name in ("bounded", "two"):
        np.testing.assert_allclose(losses(runs, name), losses(runs, "odd"), rtol=1e-5)
        np.testing.assert_allclose(losses(runs, name, "validation"), losses(runs, "odd", "validation"), rtol=1e-5)
    newest = sorted((runs / "two" / "checkpoints").glob("step-*"))[-1]
    assert {f"rank{rank}/weights" for rank in (0, 1)} <= set(stored_tensors(newest))
    said = run_ranks(refused_job, 1, options(tmp_path, "odd", 60, "--train.accumulate=2", "--name=refused"))[0]
    assert "train.accumulate=2: dataset 'tiny' has weights or missing labels" in said


def test_the_product_of_two_tasks_learns_from_all_rows():
    logits, labels, weights = drawn()
    labels[:, 1] *= labels[:, 0]
    weights = weights[:, :1].repeat(1, 2)
    weights[:, 1] *= labels[:, 0]  # conversions are observed on clicks
    weights[0, :], weights[-1, 1] = 0, 0
    x, y, w = EntireSpace([(1, 0)])(logits, labels, weights)
    p = logits.double().sigmoid().prod(1)
    torch.testing.assert_close(x[:, 2].double().sigmoid(), p, atol=1e-7, rtol=1e-6)
    assert torch.equal(y[:, 2], labels.prod(1)) and torch.equal(x[:, :2], logits)
    rows = [i for i in range(40) if weights[i, 0] and (weights[i, 1] or not labels[i, 0])]
    assert w[:, 2].nonzero().flatten().tolist() == rows
    assert torch.equal(w[rows, 2], weights[rows, 0])
    wanted = log_loss(y[rows, 2], p[rows].numpy(), sample_weight=w[rows, 2])
    assert loss_of(x[:, [2, 2]], y[:, [2, 2]], w[:, [2, 2]])[0] == pytest.approx(wanted, rel=1e-5)
    # Where both are all but certain, the chance of the contrary is not lost.
    sure = EntireSpace([(1, 0)])(torch.full((1, 2), 30.0), torch.ones(1, 2), torch.ones(1, 2))[0][0, 2]
    assert sure.item() == pytest.approx(30 - np.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("task", "fits"),
    [
        ({"where": "click = 1", "missing": False}, True),
        ({"where": '"click" > 0', "missing": False}, True),
        ({"where": "click = 1", "missing": True}, False),
        ({"where": None, "missing": True}, False),
        ({"where": "click = 1 and user > 3", "missing": False}, False),
        ({"where": "click = 0", "missing": False}, False),
        ({"where": "clicks = 1", "missing": False}, False),
    ],
)
def test_a_product_is_of_a_task_that_every_click_tells_of(task: dict[str, Any], fits: bool):
    entries = {"labels": ["click", "like"], "missing_labels": ["like"], "preparation": {"tasks": {"like": task}}}
    schema = Schema(name="tiny", dataset_id="x", features=FEATURES, splits={}, **entries)
    config = TrainConfig(entire_space={"like": "click"})
    if fits:
        check_train_config(config, schema)
    else:
        with pytest.raises(UserError, match="'like' follows 'click', but dataset 'tiny' has it on other rows;"):
            check_train_config(config, schema)


@pytest.mark.slow
def test_a_run_trains_the_product_and_measures_it(parts, tmp_path):
    def clicked(rows: pa.RecordBatch) -> pa.RecordBatch:
        click, like = (rows.column(name).to_numpy() for name in ("click", "like"))
        return with_column(rows, "like", np.where(click == 1, like, NOT_OBSERVED).astype(np.int8))

    rng = np.random.default_rng(4)
    more = {
        name: clicked(draw_rows(count, rng)) for name, count in (("train", 12000), ("validation", 500), ("test", 3000))
    }
    write(tmp_path / "esmm", more, missing_labels=["like"])
    write(tmp_path / "plain", parts)
    job = [*options(tmp_path, "esmm", 240), "--train.entire_space={like: click}", "--train.epochs=2"]
    report = run_ranks(trained, 1, [job])[0][0]
    assert list(report["test"]) == ["click", "like", "click*like"]
    # Both classes of likes are half of the clicks, and the product's share is that of likes among all rows.
    assert 0.87 < report["test"]["like"]["calibration"] < 1.15
    assert 0.87 < report["test"]["click*like"]["calibration"] < 1.15
    assert report["test"]["click*like"]["auc"] > 0.7
    assert (report["test"]["like"]["gauc_rows"], report["test"]["click*like"]["gauc_rows"]) == (
        np.sum(more["test"].column("click").to_numpy()),
        3000,
    )
    refused = {
        "{like: click}": "'like' follows 'click', but dataset 'tiny' has it on other rows;",
        "{like: buy}": "train.entire_space names 'buy'",
        "{like: like}": "'like' follows 'like', which must be no product itself",
    }
    jobs = [[*options(tmp_path, "plain", 60), f"--train.entire_space={value}"] for value in refused]
    for said, wanted in zip(run_ranks(refused_jobs, 1, jobs)[0], refused.values(), strict=True):
        assert wanted in said
