"""Every over-arch in the real job on two ranks; multi-task training; the two stages of AutoFIS."""

import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from ssr_rec.config.run import load_config
from ssr_rec.model.build import compile_over_arch
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.registry import OVER_ARCHS
from ssr_rec.runs.folder import read_metrics
from tests.jobs import own_optimizer_job, train_job
from tests.ranks import run_ranks

COMMON = ["--embeddings.dim=8", "--train.batch_size=64", "--train.eval_batch_size=100", "--train.log_every=1"]
SMALL = {
    "ssr": ["--over_arch.num_views=2", "--over_arch.view_dim=8"],
    "mlp": ["--over_arch.hidden=[16, 8]"],
    "deepfm": ["--over_arch.hidden=[16, 8]"],
    "dcn_v2": ["--over_arch.hidden=[16, 8]"],
    "mmoe": ["--over_arch.expert_hidden=[16]", "--over_arch.tower_hidden=[8]"],
    "ple": ["--over_arch.expert_hidden=[16]", "--over_arch.tower_hidden=[8]"],
    "autoint": ["--over_arch.num_layers=1", "--over_arch.deep_hidden=[16]"],
    "autofis": ["--over_arch.hidden=[16, 8]"],
    "afn": [
        "--over_arch.num_neurons=8",
        "--over_arch.hidden=[16]",
        "--over_arch.hidden_norm=none",
        "--over_arch.batch_norm=false",
        "--over_arch.plus=true",
    ],
    "wukong": ["--over_arch.num_layers=1", "--over_arch.hidden=[8]"],
    "rankmixer": ["--over_arch.num_tokens=4", "--over_arch.dim=16", "--over_arch.num_layers=1"],
}
CONFIGS = TypeAdapter(OverArchConfig)
BATCH_NORMS = {"autofis"}
"""Over-archs that always normalise with each rank's own share of the batch, so that losses depend on the world size."""


def options(name: str, dataset, runs, *more: str) -> list[str]:
    return [*COMMON, f"--over_arch.name={name}", *SMALL[name], f"--data.path={dataset}", f"--runs={runs}", *more]


def losses(folder) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "train"])


def test_every_over_arch_has_a_small_form() -> None:
    assert set(SMALL) == set(OVER_ARCHS)


@pytest.mark.parametrize(
    "name", [name if name == "ssr" else pytest.param(name, marks=pytest.mark.slow) for name in OVER_ARCHS]
)
def test_trains_on_two_ranks_as_on_one(dataset, tmp_path, name):
    reports = {}
    for world_size in (1, 2):
        run = options(name, dataset, tmp_path, f"--name=w{world_size}", "--train.max_steps=6")
        reports[world_size] = run_ranks(train_job, world_size, run)
    alone, together = losses(tmp_path / "w1"), losses(tmp_path / "w2")
    assert len(alone) == 6
    assert reports[2][0]["test"] == reports[2][1]["test"]
    assert np.abs(alone - together).max() < (0.05 if name in BATCH_NORMS else 1e-5)
    assert set(reports[1][0]["test"]) == {"click", "like"}


@pytest.mark.slow
def test_towers_and_task_weights_train_each_task(dataset, tmp_path):
    more = ["--heads.hidden=[8]", "--train.epochs=8", "--embeddings.learning_rate=0.05", "--name=run"]
    run_ranks(train_job, 1, options("mlp", dataset, tmp_path, *more, "--train.task_weights={like: 0.5}"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for task in ("click", "like"):
        assert report["test"][task]["auc"] > 0.6, task
        assert {"gauc", "logloss"} <= set(report["test"][task])
    assert report["num_head_parameters"] == 2 * (8 * 8 + 8 + 8 + 1)


@pytest.mark.slow
def test_autofis_searches_then_retrains_what_survived(dataset, tmp_path):
    more = ["--name=run", "--over_arch.grda_c=0.33", "--over_arch.grda_lr=0.2", "--train.epochs=2"]
    report, other = run_ranks(train_job, 2, options("autofis", dataset, tmp_path, *more))
    search = json.loads((tmp_path / "run-search" / "report.json").read_text())
    assert search["over_arch"]["interactions"]["stage"] == "search"
    assert search["over_arch"]["interactions"]["pairs"] == 10
    found = report["over_arch"]["interactions"]
    assert found["stage"] == "retrain" and 0 < found["pairs"] < 10
    assert other["over_arch"]["interactions"] == found, "every rank must retrain the same pairs"
    assert all({i, j} <= {"user", "history", "item", "price", "tags"} for i, j, _ in found["alphas"])
    survivors = [row[:2] for row in search["over_arch"]["interactions"]["alphas"] if row[2] != 0]
    assert survivors == [row[:2] for row in found["alphas"]]
    names = ["user", "history", "item", "price", "tags"]
    pairs = load_config(tmp_path / "run" / "config.yaml").over_arch.pairs
    assert [[names[i], names[j]] for i, j in pairs] == survivors


def test_the_optimizer_an_over_arch_brings_trains_its_parameters_and_no_other(dataset):
    kinds = run_ranks(own_optimizer_job, 1, options("autofis", dataset, "unused"), str(dataset))[0]
    assert kinds.pop("alpha") == "GRDA"
    assert set(kinds.values()) == {"AdamW"} and len(kinds) > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssr", "mlp"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_over_arch_trains_and_reports_as_the_plain_one(dataset, tmp_path, name, world_size):
    reports, files = {}, {}
    for run_name, flag in (("compiled", "true"), ("plain", "false")):
        run = options(name, dataset, tmp_path, f"--name={run_name}", "--train.epochs=1", f"--over_arch.compile={flag}")
        reports[run_name] = run_ranks(train_job, world_size, run)[0]
        files[run_name] = {path.name for path in (tmp_path / run_name / "checkpoints").rglob("*")}
    # 16 steps, the last of them on fewer rows; validation and test folds have rows of their own.
    gap = np.abs(losses(tmp_path / "compiled") - losses(tmp_path / "plain"))
    assert len(gap) == 16 and gap.max() < 1e-5
    compiled, plain = reports["compiled"], reports["plain"]
    for task in ("click", "like"):
        assert compiled["test"][task]["auc"] == pytest.approx(plain["test"][task]["auc"], abs=1e-4)
    assert compiled["over_arch"].keys() == plain["over_arch"].keys()
    assert files["compiled"] == files["plain"]


@pytest.mark.parametrize("name", OVER_ARCHS)
def test_every_over_arch_can_be_compiled_by_its_config(name, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiled.append((forward, dynamic)) or forward)
    for flag in (False, True):
        config = CONFIGS.validate_python({"name": name, "compile": flag})
        over_arch = OVER_ARCHS[name](10, 16, 1, config)
        forward, names = over_arch.forward, list(over_arch.state_dict())
        compile_over_arch(over_arch, config)
        assert compiled == [(forward, True)] * flag
        assert list(over_arch.state_dict()) == names
