"""Runs with a domain: on two ranks as on one, resumed bit for bit, measured by value, begun warm."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from ssr_rec.commands.show import main as show
from ssr_rec.metrics.by_value import MetricsByValue
from ssr_rec.runs.folder import read_metrics
from tests.checkpointing.test_resume import losses, options
from tests.jobs import refused_job, stopped_job, train_job
from tests.ranks import run_ranks

DOMAIN = ["--domain=item", "--heads.per_domain=true", "--heads.hidden=[8]"]
SSR = ["--over_arch={name: ssr, num_views: 2, view_dim: 8, domain_views: 1}"]
SHORT = [*DOMAIN, *SSR, "--train.max_steps=8", "--train.eval_every=4", "--train.log_every=1"]


@pytest.fixture(scope="module")
def run_on(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict]]:
    """Ranks -> the runs' folder and the report."""
    found = {}
    for ranks in (1, 2):
        runs = tmp_path_factory.mktemp(f"ranks{ranks}")
        found[ranks] = (runs, run_ranks(train_job, ranks, options(dataset, runs, *SHORT))[0])
    return found


def test_two_ranks_train_and_measure_as_one_does(run_on) -> None:
    (one, report), (two, other) = run_on[1], run_on[2]
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-6)
    assert report["by_value"]["column"] == "item" and set(report["by_value"]) == {"column", "validation", "test"}
    for split in ("validation", "test"):
        for task, entries in report["by_value"][split].items():
            assert sum(entry["rows"] for entry in entries) == {"validation": 301, "test": 205}[split]
            for mine, theirs in zip(entries, other["by_value"][split][task], strict=True):
                assert (mine["value"], mine["rows"]) == (theirs["value"], theirs["rows"])
                assert mine["logloss"] == pytest.approx(theirs["logloss"], abs=1e-5)
    rows = [row for row in read_metrics(one / "run" / "metrics.jsonl") if row["split"] == "test"]
    assert rows[-1]["by_value"] == report["by_value"]["test"]


def test_what_is_shown_of_a_run_has_its_values(run_on, capsys, tmp_path) -> None:
    folder = run_on[1][0] / "run"
    assert show([str(folder), "--html", str(tmp_path / "page.html")]) == 0
    table = capsys.readouterr().out
    assert "| item " in table and "| id 7 " in table
    assert "<td>id 7</td>" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(dataset, tmp_path, run_on) -> None:
    whole = run_on[1][0]
    assert run_ranks(stopped_job, 1, options(dataset, tmp_path, *SHORT), 5) == ["preempted"]
    report = run_ranks(train_job, 1, options(dataset, tmp_path, *SHORT))[0]
    assert np.array_equal(losses(tmp_path), losses(whole))
    assert report["by_value"] == run_on[1][1]["by_value"]


def test_a_run_may_be_measured_by_a_column_without_a_domain(dataset, tmp_path) -> None:
    small = ["--over_arch={name: mlp, hidden: [4]}", "--train.max_steps=2", "--train.eval_every=2"]
    report = run_ranks(train_job, 1, options(dataset, tmp_path, *small, "--train.metrics_by=price"))[0]
    assert len(report["by_value"]["test"]["click"]) == 8 and report["by_value"]["column"] == "price"
    message = run_ranks(refused_job, 1, options(dataset, tmp_path / "none", *small, "--train.metrics_by=nothing"))[0]
    assert "train.metrics_by: 'nothing' is no feature of this run" in message
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("weighted", [False, True])
def test_measures_by_value_are_those_of_the_rows_alone(weighted: bool) -> None:
    torch.manual_seed(2)
    logits, labels, codes = torch.randn(400, 2), (torch.rand(400, 2) < 0.4).float(), torch.randint(0, 5, (400,))
    weights = torch.randint(0, 3, (400, 2)).float() if weighted else None
    codes[codes == 3] = 4
    names = ["(missing)", "(unknown)", "a", "b", "c"]
    found = {}
    for mode in ("exact", "bounded"):
        metrics = MetricsByValue(mode, ["click", "like"], names)  # type: ignore[arg-type]
        for part in torch.arange(400).split(150):
            metrics.update(logits[part], labels[part], codes[part], part, None if weights is None else weights[part])
        found[mode] = metrics.compute()
    for i, task in enumerate(("click", "like")):
        exact, bounded = (found[mode][task] for mode in ("exact", "bounded"))
        assert [entry["value"] for entry in exact] == ["(missing)", "(unknown)", "a", "c"]
        for code, entry, rough in zip((0, 1, 2, 4), exact, bounded, strict=True):
            here = codes == code if weights is None else (codes == code) & (weights[:, i] > 0)
            p, y = logits[here, i].double().sigmoid().numpy(), labels[here, i].numpy()
            w = None if weights is None else weights[here, i].numpy()
            assert (entry["rows"], entry["positives"]) == (int(here.sum()), int(y.sum()))
            assert entry["auc"] == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=1e-12)
            assert entry["logloss"] == pytest.approx(log_loss(y, p, sample_weight=w, labels=[0, 1]), abs=1e-7)
            assert entry["calibration"] == pytest.approx(np.average(p, weights=w) / np.average(y, weights=w))
            assert "auc" not in rough
            assert rough == pytest.approx(
                {key: entry[key] for key in rough if key != "value"} | {"value": rough["value"]}
            )


def test_equal_rows_tie_within_a_value() -> None:
    """As in the measures of all rows: what rounding does to equal rows is no order."""
    metrics = MetricsByValue("exact", ["click"], ["a"])
    same = torch.zeros(2, dtype=torch.int64)
    metrics.update(torch.tensor([[0.1], [0.1000001]]), torch.tensor([[0.0], [1.0]]), same, same, None)
    with mock.patch("torch.distributed.is_initialized", lambda: False):
        assert metrics.compute()["click"][0]["auc"] == 0.5  # type: ignore[index]
