"""CTRClassifier: the run of the command line on the same rows, however it is copied, saved and loaded."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from ssr_rec import CTRClassifier
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema
from ssr_rec.estimator.settings import parameters_of, run_config
from ssr_rec.runs.report import read_report
from ssr_rec.train import main as train_main

KINDS: dict[str, Any] = {"categorical": ["user", "item"], "numeric": ["price"], "lists": {"tags": {"max_length": 3}}}
SMALL: dict[str, Any] = {"over_arch": {"name": "mlp", "hidden": [16]}, "batch_size": 256, "verbose": False}
TABLES = {"embeddings": {"learning_rate": 0.2}}


def make_log(rows: int = 1500, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 40, rows), rng.integers(0, 30, rows)
    odds = np.where(item % 3 == 0, 2.0, -2.0)
    return pd.DataFrame(
        {
            "user": user,
            "item": [f"item-{i}" for i in item],
            "price": rng.lognormal(3, 1, rows),
            "tags": [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 5, rows)],
            "time": np.arange(rows),
            "click": (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(int),
        }
    )


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    """Curves would take as long as a small run's training."""
    with mock.patch("ssr_rec.runs.result.draw_curves", lambda *_: None):
        yield


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    return make_log()


@pytest.fixture(scope="module")
def fitted(log: pd.DataFrame) -> CTRClassifier:
    model = CTRClassifier(**SMALL, epochs=2, config=TABLES)
    return model.fit(log, labels="click", ignore=["time"], group_id="user", min_count=2, **KINDS)


def test_it_is_the_run_of_the_command_line(log: pd.DataFrame, fitted: CTRClassifier, tmp_path: Path) -> None:
    log.to_parquet(tmp_path / "log.parquet", index=False)
    entries = {**KINDS, "name": "log", "labels": ["click"], "ignore": ["time"], "group_id": "user", "min_count": 2}
    prepare([str(tmp_path / "log.parquet")], tmp_path / "data", make_spec(entries, "test"))
    options = ["--over_arch={name: mlp, hidden: [16]}", "--embeddings.learning_rate=0.2", "--train.epochs=2"]
    where = [f"--data.path={tmp_path / 'data'}", f"--runs={tmp_path}", "--name=run"]
    assert train_main([*options, *where, "--train.batch_size=256", "--device=cpu"]) == 0
    report = read_report(tmp_path / "run")
    assert report.test["click"] == fitted.report_.test["click"]
    assert report.validation == fitted.report_.validation
    assert report.test["click"]["auc"] > 0.6  # type: ignore[operator]

    loaded = CTRClassifier.load(tmp_path / "run")
    assert np.array_equal(loaded.predict_proba(log), fitted.predict_proba(log))
    assert loaded.epochs == 2 and loaded.config["embeddings"] == TABLES["embeddings"]
    assert loaded.columns_.categorical == ["user", "item"]


def test_copies_score_alike_and_outlive_the_first(fitted: CTRClassifier, log: pd.DataFrame, tmp_path: Path) -> None:
    wanted = fitted.predict_proba(log)
    assert wanted.shape == (len(log), 2) and np.allclose(wanted.sum(1), 1)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(log), wanted)
    other_order = log[log.columns[::-1]].drop(columns=["click", "time"])
    assert np.array_equal(fitted.predict_proba(other_order), wanted)
    with mock.patch("ssr_rec.serving.run_scorer.ROWS_AT_ONCE", 100):
        assert np.allclose(fitted.predict_proba(log), wanted, rtol=0, atol=1e-6)
    fitted.save(tmp_path / "saved")
    fitted.to_run(tmp_path / "run")
    for name in ("saved", "run"):
        loaded = CTRClassifier.load(tmp_path / name)
        assert np.array_equal(loaded.predict_proba(log), wanted)
        assert loaded.get_params() == fitted.get_params() and loaded.report_.name == name
        assert loaded.history_.equals(fitted.history_) and loaded.classes_.tolist() == [0, 1]
    assert not (tmp_path / "saved" / "data" / "train").exists()
    config = load_config(tmp_path / "run" / "config.yaml")
    assert Schema.read(str(config.data.path)).splits["train"].num_rows > 1000
    assert not hasattr(clone(fitted), "report_")
    with pytest.raises(UserError, match="something in it"):
        fitted.save(tmp_path / "saved")


def test_rows_held_out_are_the_test_of_the_report() -> None:
    train, validation, test = make_log(1200), make_log(300, 1), make_log(300, 2)
    for frame in (train, validation, test):
        frame["click"] = np.where(frame["click"] == 1, "yes", "no")
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    model = CTRClassifier(**SMALL, config=TABLES)
    model.fit(train, labels="click", validation=(validation, test), ignore=["time"], **KINDS)
    assert model.classes_.tolist() == ["no", "yes"] and set(model.predict(test)) <= {"no", "yes"}
    scores = model.predict_proba(test)[:, 1]
    by_sklearn = roc_auc_score(test["click"] == "yes", scores)
    assert model.score(test) == pytest.approx(by_sklearn, abs=1e-12)
    assert model.score(test.drop(columns="click"), test["click"]) == model.score(test)
    assert model.report_.test["click"]["auc"] == pytest.approx(by_sklearn, abs=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_two_labels_a_history_and_its_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(700)
    log["like"] = log["click"] * (log["price"] > 20)
    history = {"by": "user", "order": "time", "where": "click = 1", "columns": ["item"]}
    model = CTRClassifier("mlp", encoders={"clicked": "din"}, batch_size=64)
    model.fit(
        log.drop(columns="tags"),
        labels=["click", "like"],
        categorical=["user"],
        sequences={"clicked": {"max_length": 5, "from_log": history}},
        validation=0.3,
    )
    said = capsys.readouterr()
    assert "item*" in said.out and "price*" in said.out and "sequences    clicked" in said.out
    assert "step" in said.err and model.columns_.ignore == []
    rows = log.head(50).assign(clicked_item=[["item-1", "item-2"]] * 50)
    found = model.predict_proba(rows)
    assert isinstance(found, list) and [one.shape for one in found] == [(50, 2)] * 2
    assert model.predict(rows).shape == (50, 2) and len(model.classes_) == 2
    with pytest.raises(UserError, match="no column 'clicked_item'"):
        model.predict_proba(log)


def test_parameters_there_and_back() -> None:
    din = {"name": "din", "hidden": [8], "target": ["item"]}
    model = CTRClassifier("mlp", encoders={"clicked": din, "seen": "pool"}, epochs=3, config={"train": {"patience": 2}})
    config = run_config(model.get_params(deep=False), Path("run"), Path("data"))
    assert config.sequences["clicked"].target == ["item"] and config.sequences["seen"].target is None
    again = run_config(parameters_of(config), Path("run"), Path("data"))
    assert again.sequences == config.sequences and again == config


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"config": {"train": {"epochs": 2}}}, {}, "train.epochs is the parameter epochs"),
        ({"config": {"seed": 2}}, {}, "seed is the parameter seed"),
        ({"config": {"runs": "here"}}, {}, "to_run"),
        ({"config": {"data": {"path": "here"}}}, {}, "data.path"),
        ({"config": {"train": 3}}, {}, "give a mapping"),
        ({"config": {"train": {"patiense": 2}}}, {}, "did you mean 'patience'"),
        ({"over_arch": "mpl"}, {}, "over_arch"),
        ({"over_arch": 3}, {}, "give a name"),
        ({"epochs": 0}, {}, "epochs"),
        ({}, {"labels": None}, "requires y to be passed"),
        ({}, {"labels": "klick"}, "no column 'klick'"),
        ({}, {"labels": "item"}, "Only binary classification"),
        ({}, {"y": [0, 1] * 750}, "y and labels both"),
        ({}, {"categorical": ["usr"]}, "did you mean 'user'"),
        ({}, {"min_counts": 2}, "did you mean 'min_count'"),
        ({}, {"validation": 1.5}, "between 0 and 1"),
        ({}, {"validation": "all"}, "give a share"),
        ({}, {"validation": 0.1, "split": {"type": "random"}}, "give one"),
        ({"encoders": {"tags": 7}}, {}, "encoders: tags"),
    ],
)
def test_what_does_not_go_together_is_said(
    log: pd.DataFrame, settings: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        CTRClassifier(**{"verbose": False, **settings}).fit(log, **{"labels": "click", **options})


def test_a_missing_label_and_a_class_never_seen_are_named(log: pd.DataFrame, fitted: CTRClassifier) -> None:
    with pytest.raises(UserError, match="row 1: a label is missing"):
        CTRClassifier().fit(log[["user"]].head(3), [0, None, 1])
    with pytest.raises(UserError, match="row 2: label 'y' is 7"):
        fitted.score(log.head(3), [0, 1, 7])


def test_importing_the_package_is_light() -> None:
    code = "import sys, ssr_rec; sys.exit(bool({'torch', 'sklearn', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_sample_weight_is_a_column_of_weights_and_weights_the_score(
    log: pd.DataFrame, fitted: CTRClassifier, tmp_path: Path
) -> None:
    weights = np.random.default_rng(1).gamma(1, 1, len(log)).round(3)
    roles = {"ignore": ["time"], "group_id": "user", "min_count": 2, **KINDS}
    one, other = (CTRClassifier(**SMALL, config=TABLES) for _ in range(2))
    one.fit(log, labels="click", sample_weight=weights, **roles)
    other.fit(log.assign(w=weights), labels="click", weight="w", **roles)
    p = one.predict_proba(log)[:, 1]
    np.testing.assert_array_equal(p, other.predict_proba(log)[:, 1])
    assert one.report_.test == other.report_.test != fitted.report_.test
    assert one.score(log, log["click"], sample_weight=weights) == pytest.approx(
        roc_auc_score(log["click"], p, sample_weight=weights), abs=1e-6
    )
    one.save(tmp_path / "saved")
    np.testing.assert_array_equal(CTRClassifier.load(tmp_path / "saved").predict_proba(log)[:, 1], p)
    for odd, said in (
        ({"sample_weight": weights[:-1]}, "give one weight for each of the 1500 rows"),
        ({"sample_weight": np.where(weights == weights[7], -1, weights)}, "sample_weight is -1.0; a weight must be"),
        ({"sample_weight": log["click"]}, "label 'click' has one class alone among the rows of a weight above 0"),
        ({"sample_weight": weights, "weight": "price"}, "sample_weight and weight='price' both give the weights"),
    ):
        with pytest.raises(UserError, match=said):
            CTRClassifier(**SMALL).fit(log, labels="click", **odd, **roles)
