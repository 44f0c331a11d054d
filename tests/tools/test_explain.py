"""The command that asks a run: its answers, its pictures, and what it refuses."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from ssr_rec.data.synthetic.config import HISTORY, PLANTED, SyntheticConfig
from ssr_rec.data.synthetic.fields import Fields
from ssr_rec.data.synthetic.truth import build_truth, draw_block
from tests.jobs import train_job
from tests.made_run import make_run
from tests.ranks import run_ranks
from tools.explain import main

SMALL = ["--embeddings.dim=8", "--over_arch.num_views=2", "--over_arch.view_dim=8"]


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_every_answer_is_given(kind, dataset, tmp_path, capsys):
    run = make_run(tmp_path / "run", dataset, [*SMALL, f"--over_arch.filter={kind}"])
    assert main([str(run), "--min-rows=20", "--seeds=2", "--group=pair=user,item", "--slices", "price", "like"]) == 0
    printed = capsys.readouterr().out.splitlines()
    said = json.loads(printed[-1])
    found = json.loads(Path(said["json"]).read_text())
    names = {"importance.png", "filters.png", "slices.png", "calibration.png", "drift.png"}
    assert {Path(path).name for path in said["pictures"]} == names
    assert all(Path(path).stat().st_size > 5_000 for path in said["pictures"])
    assert found["rows"] == 205 and found["filters"]["kind"] == kind and found["trained_on"] == ["train"]
    assert {one["name"] for one in found["importance"]["groups"]} == {
        "user",
        "history",
        "item",
        "price",
        "tags",
        "pair",
    }
    assert {one["column"] for one in found["slices"]["click"]} == {"price", "like"}
    assert len(found["deciles"]["like"]) == 10 and {one["column"] for one in found["drift"]} > {"user", "tags (length)"}
    assert sum(line.startswith("### ") for line in printed) == 6
    assert (Path(said["json"]).parent / "explain.md").read_text().startswith("### Permutation importance")


@pytest.mark.slow
def test_figures_are_those_of_the_report(dataset, tmp_path, capsys):
    options = [*SMALL, f"--data.path={dataset}", f"--runs={tmp_path}", "--name=run", "--train.batch_size=64"]
    report = run_ranks(train_job, 2, options)[0]
    assert main([str(tmp_path / "run"), "--seeds=1"]) == 0
    found = json.loads((tmp_path / "run/explain/test/explain.json").read_text())
    for task, measures in report["test"].items():
        for name, value in measures.items():
            assert found["tasks"][task][name] == pytest.approx(value, abs=1e-6), name
        assert len(report["deciles"][task]) == len(found["deciles"][task]) == 10
        for mine, theirs in zip(found["deciles"][task], report["deciles"][task], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slices", "nothing"], "column 'nothing': the shards of"),
        (["--group", "pair"], "--group pair: give NAME=COLUMN,COLUMN"),
        (["--group", "pair=user,nobody"], "no feature 'nobody' in the run"),
        (["--split", "tomorrow"], "--split tomorrow: the dataset has train, validation, test"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(options, said, dataset, tmp_path, capsys):
    run = make_run(tmp_path / "run", dataset, SMALL)
    assert main([str(run), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and not (run / "explain").exists()


def true_importance(config: SyntheticConfig) -> dict[str, float]:
    """Nats a row by which the truth itself predicts clicks worse once a field's values are exchanged between rows."""
    truth = build_truth(config)
    rows = draw_block(truth, "test", 0, 20_000)
    p, lost = rows.probabilities["click"], {}
    order = np.random.default_rng(0).permutation(len(p))
    for column in truth.columns:
        ids, history, offsets = rows.fields.ids, rows.fields.history, rows.fields.offsets
        if column.name == HISTORY:
            lists = [history[a:b] for a, b in pairwise(offsets)]
            lists = [lists[i] for i in order]
            history = np.concatenate(lists)
            offsets = np.concatenate([[0], np.cumsum([len(one) for one in lists])])
        else:
            ids = {**ids, column.name: ids[column.name][order]}
        q = truth.probabilities(Fields(ids, history, offsets))["click"]
        lost[column.name] = float(np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))))
    return lost


@pytest.mark.slow
def test_the_fields_of_the_truth_come_before_all_others(tmp_path, capsys):
    options = [f"--data.synthetic_root={tmp_path}", f"--runs={tmp_path}", "--name=run", "--data.labels=[click]"]
    options += ["--data.synthetic.train_rows=600000", "--data.synthetic.users=2000", "--data.synthetic.items=1000"]
    options += ["--data.synthetic.validation_rows=20000", "--data.synthetic.test_rows=20000"]
    options += ["--train.epochs=1", "--train.batch_size=1024", "--over_arch.num_views=4", "--over_arch.view_dim=64"]
    run_ranks(train_job, 1, options)
    assert main([str(tmp_path / "run"), "--seeds=3"]) == 0
    found = json.loads((tmp_path / "run/explain/test/explain.json").read_text())
    measured = {one["name"]: one["logloss_lost"]["click"]["mean"] for one in found["importance"]["groups"]}
    truth = true_importance(SyntheticConfig(train_rows=600_000, users=2_000, items=1_000))
    assert set(measured) == set(truth) and sum(value > 0 for value in truth.values()) == len(PLANTED) + 1
    correlation = spearmanr([truth[name] for name in truth], [measured[name] for name in truth]).statistic
    with capsys.disabled():
        worst = min((measured[name], name) for name in truth if truth[name] > 0)
        best = max((measured[name], name) for name in truth if truth[name] == 0)
        print(f"\nSpearman {correlation:.3f}; last field of the truth {worst}, first other {best}")
    assert correlation > 0.8 and worst > best
