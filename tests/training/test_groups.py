"""Runs whose losses and measures are within groups: of any number of ranks, resumed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.config.losses import PairwiseConfig, SoftmaxConfig
from ssr_rec.config.run import load_config
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.schema import Schema
from ssr_rec.model.losses.registry import build_losses
from ssr_rec.runs.folder import read_metrics
from ssr_rec.runs.quality import quality_warnings
from ssr_rec.training.monitor import monitored
from ssr_rec.training.setup import check_train_config
from tests.data.test_together import IGNORE, requests
from tests.jobs import train_job
from tests.prepare_log import spec_with, write_parquet
from tests.ranks import run_ranks

RUN = [
    *("--over_arch={name: mlp, hidden: [8]}", "--embeddings.dim=4", "--embeddings.learning_rate=0.05"),
    *("--train.eval_every=4", "--train.log_every=1", "--train.max_steps=8", "--data.num_lanes=2"),
    *("--data.features=[user, city]", "--train.batch_size=96", "--train.eval_batch_size=256"),
    *("--train.ranking_metrics=[ndcg@3, mrr, hit@1]", "--train.monitor=mrr"),
]


def test_a_monitored_ranking_must_be_measured_and_larger_is_better():
    config = TrainConfig(ranking_metrics=["mrr", "ndcg@5"], monitor="ndcg@5")
    assert monitored({"click": {"ndcg@5": 0.4, "mrr": 0.1}}, config) == 0.4
    with pytest.raises(UserError, match=r"monitor: mrr is not measured; add it to train.ranking_metrics"):
        load_config(None, ["--train.monitor=mrr"])
    with pytest.raises(UserError, match="ranking_metrics"):
        load_config(None, ["--train.ranking_metrics=[ndcg@0]"])


def test_groups_that_a_dataset_lacks_are_refused(dataset):
    schema = Schema.read(dataset)
    config = TrainConfig(losses={"click": SoftmaxConfig()})
    with pytest.raises(UserError, match=r"train.losses.click: softmax compares .* 'tiny' has shuffled apart"):
        build_losses(config, schema)
    together = schema.model_copy(update={"together": "user"})
    assert [type(loss).__name__ for loss in build_losses(config, together).all] == ["Softmax", "CrossEntropy"]
    check_train_config(TrainConfig(ranking_metrics=["mrr"]), schema)
    with pytest.raises(UserError, match=r"train.ranking_metrics: dataset 'tiny' has no groups to rank within"):
        check_train_config(TrainConfig(ranking_metrics=["mrr"]), schema.model_copy(update={"group_id": None}))


def test_a_task_trained_to_rank_alone_is_said_to_have_no_probabilities(dataset):
    bad = {"ne": 3.0, "calibration": 9.0}
    said = quality_warnings(Schema.read(dataset), {"test": {"click": bad, "like": bad}}, ["click"])
    assert len(said) == 3 and said[0].startswith("click: trained to rank alone")
    assert all("like" in one for one in said[1:])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    path = write_parquet(requests(3000), folder / "log.parquet")
    spec = spec_with(split={"type": "random", "ratios": [6, 2, 2]}, together="request", ignore=IGNORE)
    prepare([str(path)], folder / "data", spec)
    return folder / "data"


def trained(jobs: list[list[str]]) -> list[dict[str, Any]]:
    return [train_job(options) for options in jobs]


@pytest.mark.slow
def test_runs_within_groups_are_those_of_any_number_of_ranks_and_resume(together, tmp_path):
    runs = tmp_path / "runs"
    where = [*RUN, f"--data.path={together}", f"--runs={runs}", "--checkpoint.every_steps=4"]

    def job(name: str, loss: str, *more: str) -> list[str]:
        return [*where, f"--name={name}", f"--train.losses={{click: {loss}}}", *more]

    pure = "{name: softmax, cross_entropy: 0}"
    alone = [job("softmax", "softmax"), job("pairwise", "pairwise"), job("pure", pure)]
    alone += [job("bounded", "softmax", "--train.metrics=bounded")]
    reports = run_ranks(trained, 1, alone)[0]
    two = [job("softmax2", "softmax"), job("pairwise2", "pairwise")]
    two += [job("half", pure, "--train.max_steps=4")]
    run_ranks(trained, 2, two)
    # The rest of a run that stopped, on one rank.
    resumed = run_ranks(trained, 1, [job("rest", pure, f"--resume={runs / 'half'}")])[0][0]

    def rows(name: str, split: str) -> list[dict[str, Any]]:
        return [row for row in read_metrics(runs / name / "metrics.jsonl") if row["split"] == split]

    def losses(*names: str) -> list[float]:
        by_step = {row["step"]: row["loss"] for name in names for row in rows(name, "train")}
        return [by_step[step] for step in range(1, 9)]

    for names, other in ((["softmax2"], "softmax"), (["pairwise2"], "pairwise"), (["half", "rest"], "pure")):
        np.testing.assert_allclose(losses(*names), losses(other), rtol=2e-6)
    assert {run["steps"] for run in reports} == {resumed["steps"]} == {8}
    for row in rows("softmax", "validation"):
        assert {"ndcg@3", "mrr", "hit@1", "ranking_groups"} <= set(row["tasks"]["click"])
    assert reports[3]["test"]["click"]["mrr"] == pytest.approx(reports[0]["test"]["click"]["mrr"], abs=1e-6)
    assert reports[0]["validation"]["click"]["mrr"] == max(
        row["tasks"]["click"]["mrr"] for row in rows("softmax", "validation")
    )
    assert 0 < reports[0]["dataset"]["cut_groups"] < 0.2
    assert "trained to rank alone" in reports[2]["warnings"][0]
    assert not any("rank alone" in said for said in reports[0]["warnings"])
    assert PairwiseConfig().cross_entropy == 0.5
