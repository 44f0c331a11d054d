"""Runs with a task that is a number beside a binary one: on ranks, resumed, reported, exported, asked, refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from ssr_rec.checkpointing.format import read_checkpoint, stored_tensors
from ssr_rec.checkpointing.manager import TRAINING
from ssr_rec.common.errors import UserError
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.number_labels import NumberLabel
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.estimator.classifier import CTRClassifier
from ssr_rec.explaining.explanation import Question, explain_run
from ssr_rec.metrics.exact import auc
from ssr_rec.metrics.numbers import mae, rmse, xauc
from ssr_rec.runs.curves import curves_figure
from ssr_rec.runs.folder import read_metrics
from ssr_rec.runs.html_page import runs_page
from ssr_rec.runs.report import read_run
from ssr_rec.runs.table import runs_table, summary
from ssr_rec.serving import load
from ssr_rec.serving.export import export_run
from ssr_rec.serving.trained_model import restore_model
from ssr_rec.training.setup import check_train_config
from tests.conftest import draw_rows
from tests.jobs import refused_jobs, stopped_job, train_job
from tests.ranks import run_ranks
from tests.training.test_row_weights import write

RUN = [
    *("--over_arch={name: mlp, hidden: [16]}", "--embeddings.dim=4", "--embeddings.learning_rate=0.05"),
    *("--optimizer.learning_rate=0.01", "--train.batch_size=64", "--train.eval_every=10", "--train.epochs=2"),
    *("--train.log_every=5", "--name=run", "--checkpoint.every_minutes=null"),
    "--checkpoint.every_steps=30",
]
BOTH = [
    "--train.losses={click: focal, watch_s: log_normal}",
    "--train.task_weighting=uncertainty",
    "--train.task_weights={watch_s: 2}",
    "--optimizer.ema_decay=0.9",
]


def with_seconds(rows: pa.RecordBatch, rng: np.random.Generator) -> pa.RecordBatch:
    """Rows with seconds that depend on user and item, null for a tenth of them."""
    user, item = (rows.column(name).to_numpy() for name in ("user", "item"))
    seconds = np.exp(2 + np.sin(user) + np.cos(3 * item) + 0.5 * rng.normal(size=rows.num_rows)).astype(np.float32)
    values = pa.array(seconds, mask=rng.random(rows.num_rows) < 0.1)
    return rows.append_column("watch_s", values)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset with the label ``watch_s``."""
    rng = np.random.default_rng(8)
    parts = {split: with_seconds(draw_rows(rows, rng), rng) for split, rows in (("train", 900), ("validation", 300))}
    parts["test"] = with_seconds(draw_rows(300, rng), rng)
    trained = parts["train"].column("watch_s").drop_null().to_numpy().astype(np.float64)
    logs = np.log1p(trained)
    number = NumberLabel(
        name="watch_s", mean=trained.mean(), std=trained.std(), log_mean=logs.mean(), log_std=logs.std(),
        low=float(trained.min()), high=float(trained.max()),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("seconds") / "data"
    return write(folder, parts, labels=["click", "watch_s"], missing_labels=["watch_s"], numbers=[number])


def test_a_day_added_with_numbers_below_0_is_refused_for_log_normal(seconds: Path) -> None:
    config, schema = TrainConfig(losses={"watch_s": "log_normal"}), Schema.read(seconds)
    check_train_config(config, schema)
    grown = schema.model_copy(update={"numbers": [schema.numbers[0].widened(-3.0, None)]})
    with pytest.raises(UserError, match=r"watch_s: log_normal: .* 'watch_s' goes down to -3; use mse"):
        check_train_config(config, grown)


def options(seconds: Path, runs: Path, *more: str) -> list[str]:
    return [*RUN, f"--data.path={seconds}", f"--runs={runs}", *more]


@pytest.fixture(scope="module")
def trained(seconds: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run folder and the report of a run of both kinds of tasks."""
    runs = tmp_path_factory.mktemp("runs")
    return runs / "run", run_ranks(train_job, 1, options(seconds, runs, *BOTH))[0]


def predictions(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits (N, 2), labels (N, 2), weights (N, 2) and predicted seconds (N,) of the test split by a plain loop."""
    restored = restore_model(run)
    logits, labels, weights = [], [], []
    with torch.no_grad():
        for batch in Reader(restored.data, restored.schema, "test", 512).epoch(0):
            logits.append(restored.model(batch.sparse, batch.dense))
            labels.append(batch.labels)
            weights.append(batch.weights)
    x, y, w = (torch.cat(parts).numpy() for parts in (logits, labels, weights))
    number = restored.schema.numbers[0]
    link = restored.links["watch_s"]
    middle = number.log_mean + number.log_std * x[:, 1].astype(np.float64)
    variance = 2 * (link.inner_shift - number.log_mean)
    return x, y, w, np.maximum(np.exp(middle + variance / 2) - 1, 0)


def test_the_report_has_the_measures_of_each_kind(trained: tuple[Path, dict[str, Any]]) -> None:
    run, report = trained
    x, y, w, seen = predictions(run)
    found, keep = report["test"], w[:, 1] > 0
    assert 0 < keep.sum() < len(keep)
    assert found["click"]["auc"] == pytest.approx(auc(x[:, 0], y[:, 0]), abs=1e-6)
    wanted = {"rmse": rmse(seen[keep], y[keep, 1]), "mae": mae(seen[keep], y[keep, 1])}
    wanted["xauc"] = xauc(x[keep, 1], y[keep, 1])
    wanted["calibration"] = seen[keep].sum() / y[keep, 1].sum()
    assert found["watch_s"] == pytest.approx(wanted, rel=1e-5)
    assert wanted["xauc"] > 0.65 and 0.8 < wanted["calibration"] < 1.25
    assert sum(one["rows"] for one in report["deciles"]["watch_s"]) == keep.sum()
    assert not any("watch_s" in warning for warning in report["warnings"])
    rows = read_metrics(run / "metrics.jsonl")
    progress = [row for row in rows if row["split"] == "train"]
    assert all([*map(list, row["tasks"].values())] == [["auc"], ["xauc"]] for row in progress)
    assert progress[-1]["tasks"]["watch_s"]["xauc"] > 0.5
    weights = [row["task_weights"] for row in progress]
    assert weights[0] != weights[-1] and set(weights[0]) == {"click", "watch_s"}
    evaluated = next(row for row in rows if row["split"] == "test")
    std = restore_model(run).schema.numbers[0].std
    loss = (found["click"]["logloss"] + (found["watch_s"]["rmse"] / std) ** 2) / 2
    assert evaluated["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.slow
def test_two_ranks_are_one_process(seconds: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, report = trained
    two = run_ranks(train_job, 2, options(seconds, tmp_path, *BOTH))[0]
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", run))
    for here, there in zip(mine, theirs, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=2e-5)
        assert here.get("task_weights", {}) == pytest.approx(there.get("task_weights", {}), rel=1e-5)
    for task, measures in report["test"].items():
        assert two["test"][task] == pytest.approx(measures, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_whole_one_to_the_bit(
    seconds: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: int
) -> None:
    """With the variance of a log-normal loss and the uncertainties of both tasks."""
    run, report = trained
    if ranks > 1:
        run, report = (
            tmp_path / "whole",
            run_ranks(train_job, ranks, options(seconds, tmp_path, *BOTH, "--name=whole"))[0],
        )
    assert run_ranks(stopped_job, ranks, options(seconds, tmp_path, *BOTH), 16) == ["preempted"] * ranks
    resumed = run_ranks(train_job, ranks, options(seconds, tmp_path, *BOTH))[0]
    assert resumed["test"] == report["test"]
    mine, theirs = (
        {row["step"]: (row["loss"], row["task_weights"]) for row in read_metrics(at / "metrics.jsonl") if "lr" in row}
        for at in (tmp_path / "run", run)
    )
    assert {step: mine[step] for step in (25, 30)} == {step: theirs[step] for step in (25, 30)}


@pytest.mark.slow
def test_the_artifact_predicts_in_the_labels_unit(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = trained
    exported = export_run(run, tmp_path / "artifact")
    x, y, w, seen = predictions(run)
    scorer = load(tmp_path / "artifact")
    assert set(scorer.manifest.links) == {"watch_s"} and exported["parity"]["max_difference"] < 1e-5
    schema = restore_model(run).schema
    batches = list(Reader(restore_model(run).data, schema, "test", 512).epoch(0))
    sparse = batches[0].sparse
    found = scorer.predict_encoded(scorer_arrays(scorer, sparse))
    np.testing.assert_allclose(found["watch_s"], seen[: len(batches[0].labels)], rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(found["click"], 1 / (1 + np.exp(-x[: len(found["click"]), 0])), rtol=1e-5)
    assert exported["measures"]["artifact"]["watch_s"]["rmse"] == pytest.approx(
        rmse(seen[w[:, 1] > 0], y[w[:, 1] > 0, 1]), rel=1e-5
    )


def scorer_arrays(scorer: Any, sparse: Any) -> Any:
    from ssr_rec.serving.raw_rows import Encoded

    ids, lists = scorer._split(sparse.values().numpy(), sparse.lengths().numpy())
    return Encoded(ids, lists, [None] * len(lists))


def test_tables_pictures_and_pages_hold_for_numbers(trained: tuple[Path, dict[str, Any]]) -> None:
    run = trained[0]
    found = read_run(run)
    table = runs_table([found])
    assert "watch_s XAUC" in table and "watch_s RMSE" in table and "click AUC" in table
    assert "watch_s XAUC" in summary([found, found]) and "XAUC" in runs_page([run])
    axes = curves_figure(found.rows, found.report).axes
    assert axes[1].get_title(loc="left") == "Validation AUC and XAUC"
    alone = found.report.model_copy(update={"test": {"watch_s": found.report.test["watch_s"]}})
    assert "watch_s RMSE" in runs_table([found._replace(report=alone)])


@pytest.mark.slow
def test_what_is_asked_of_numbers_is_refused_or_left_out(
    trained: tuple[Path, dict[str, Any]], seconds: Path, tmp_path: Path
) -> None:
    run = trained[0]
    answers = explain_run(run, Question(importance_rows=50, seeds=1))
    assert list(answers["tasks"]) == list(answers["slices"]) == ["click"] and set(answers["numbers"]) == {"watch_s"}
    with pytest.raises(UserError, match="label 'watch_s' is a number, and CTRClassifier predicts classes"):
        CTRClassifier.load(run)
    frame = pd.DataFrame({"user": ["a", "b"] * 20, "watch_s": [0, 1] * 20})
    with pytest.raises(UserError, match="label 'watch_s' is a number, and CTRClassifier predicts classes"):
        CTRClassifier(verbose=False).fit(frame, labels="watch_s", tasks={"watch_s": {"kind": "number"}})
    only = "--data.labels=[watch_s]"
    messages = run_ranks(
        refused_jobs,
        1,
        [
            options(seconds, tmp_path, only),
            options(seconds, tmp_path, only, "--train.monitor=xauc", "--train.metrics=bounded"),
            options(seconds, tmp_path, "--train.extra_metrics=['no_such:f']"),
            options(seconds, tmp_path, "--train.extra_metrics=['math:hypot']", "--train.metrics_rows=100"),
            options(seconds, tmp_path, "--train.entire_space={click: watch_s}"),
        ],
    )[0]
    for message, said in zip(
        messages,
        (
            "train.monitor: auc, but watch_s is numbers: use rmse",
            "train.monitor: xauc needs every prediction of split 'validation'",
            "train.extra_metrics no_such:f: cannot import no_such",
            "train.extra_metrics needs every prediction of split 'validation', and train.metrics=auto keeps",
            "train.entire_space: 'watch_s' is a number",
        ),
        strict=True,
    ):
        assert said in message and "\n" not in message


@pytest.mark.slow
def test_a_run_of_a_number_alone_is_chosen_by_its_error(seconds: Path, tmp_path: Path) -> None:
    more = ["--data.labels=[watch_s]", "--train.monitor=rmse", "--train.metrics=bounded", "--train.losses={}"]
    report = run_ranks(train_job, 1, options(seconds, tmp_path, *more))[0]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["split"] == "validation"]
    errors = [row["tasks"]["watch_s"]["rmse"] for row in rows]
    assert report["best_step"] == rows[int(np.argmin(errors))]["step"]
    assert set(report["test"]["watch_s"]) == {"rmse", "mae", "calibration"} and math.isfinite(errors[0])
    found = read_run(tmp_path / "run")
    assert "watch_s RMSE" in summary([found, found])
    assert curves_figure(found.rows, found.report).axes[1].get_title(loc="left") == "Validation RMSE"


def test_a_training_checkpoint_predicts_by_the_average_as_its_evaluation(trained: tuple[Path, dict[str, Any]]) -> None:
    last = max((trained[0] / "checkpoints").glob(f"{TRAINING}*"))
    names = [name for name in stored_tensors(last) if name.endswith("of_watch_s.log_variance/average")]
    assert len(names) == 1
    read_checkpoint({names[0]: (average := torch.zeros(1))}, last)
    number = restore_model(trained[0]).schema.numbers[0]
    assert number.log_mean is not None and number.log_std is not None
    middle = number.log_mean + number.log_std**2 * math.exp(10 * average.item()) / 2
    assert restore_model(last).links["watch_s"].inner_shift == pytest.approx(middle, rel=1e-6)
    raw = torch.zeros(1)
    read_checkpoint({"model/loss.losses.of_tasks.of_watch_s.log_variance": raw}, last)
    assert not torch.equal(raw, average)
