"""Every answer about a model counts rows by their weights, and leaves out those that a task does not ask of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from ssr_rec.data.reader import Reader
from ssr_rec.explaining.explanation import Question, explain_run
from ssr_rec.explaining.importance import Importance
from ssr_rec.explaining.slices import slices
from ssr_rec.explaining.values import Column
from ssr_rec.serving.trained_model import restore_model
from tests.data.test_row_weights import SPEC, weighted_rows
from tests.made_run import make_run
from tests.prepare_log import run, spec_with, write_parquet


def test_slices_are_scikit_learns_with_weights():
    rng = np.random.default_rng(0)
    codes, logits, weights = rng.integers(0, 3, 2000), rng.normal(-1, 1, 2000), rng.gamma(0.5, 2, 2000)
    labels = (rng.random(2000) < 1 / (1 + np.exp(-logits))).astype(float)
    weights[rng.random(2000) < 0.3] = 0
    frame = pd.DataFrame({"code": codes, "x": logits, "y": labels, "w": weights})[weights > 0]
    frame["p"] = 1 / (1 + np.exp(-frame.x))
    for one in slices(logits, labels, Column("page", codes, ["a", "b", "c"]), 10, weights):
        part = frame[frame.code == "abc".index(one["value"])]
        assert (one["rows"], one["positives"]) == (len(part), part.y.sum())
        assert one["auc"] == pytest.approx(roc_auc_score(part.y, part.x, sample_weight=part.w))
        assert one["logloss"] == pytest.approx(log_loss(part.y, part.p, sample_weight=part.w))
        assert one["calibration"] == pytest.approx((part.w * part.p).sum() / (part.w * part.y).sum())


def test_a_task_without_rows_does_not_decide_what_matters():
    found = [
        Importance(name, [name], {}, {"click": [lost], "pay": [float("nan")]}) for name, lost in (("a", 1), ("b", 2))
    ]
    assert [one.total for one in found] == [1, 2]
    assert np.isnan(Importance("c", ["c"], {}, {"pay": [float("nan")]}).total)


@pytest.mark.slow
def test_an_explanation_is_of_the_rows_that_count(tmp_path):
    path = write_parquet(weighted_rows(3000), tmp_path / "log.parquet")
    schema, _ = run(tmp_path, [path], spec_with(**{**SPEC, "hash_buckets": {"uid": 50}}), "data")
    folder = make_run(
        tmp_path / "run", tmp_path / "data", ["--over_arch={name: mlp, hidden: [8]}", "--embeddings.dim=4"]
    )
    found = explain_run(folder, Question(columns=["user"], min_rows=5, seeds=1))
    model = restore_model(folder).model
    parts = []
    with torch.no_grad():
        for batch in Reader(tmp_path / "data", schema, "test", 256).epoch(0):
            parts.append((model(batch.sparse), batch.labels, batch.weights))
    logits, labels, weights = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
    for task, name in enumerate(schema.labels):
        x, y, w = logits[:, task], labels[:, task], weights[:, task]
        measures = found["tasks"][name]
        assert measures["auc"] == pytest.approx(roc_auc_score(y, x, sample_weight=w), abs=1e-5)
        assert measures["logloss"] == pytest.approx(log_loss(y, 1 / (1 + np.exp(-x)), sample_weight=w), rel=1e-5)
        precision = found["precision_recall"][name]["average_precision"]
        assert precision == pytest.approx(average_precision_score(y, x, sample_weight=w), abs=1e-5)
        assert sum(part["rows"] for part in found["deciles"][name]) == pytest.approx(w.sum())
        assert sum(one["rows"] for one in found["slices"][name]) == (w > 0).sum()
    base = {name: found["tasks"][name]["auc"] for name in schema.labels}
    for one in found["importance"]["groups"]:
        assert all(-1 <= base[name] - lost <= 1 for name in schema.labels for lost in one["auc"][name])
