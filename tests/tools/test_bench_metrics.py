"""The benchmark of an evaluation's measures on a small run."""

import json

import pytest

from tests.checkpointing.test_resume import options
from tests.jobs import train_job
from tests.ranks import run_ranks
from tools.bench_metrics import main


@pytest.mark.slow
def test_shares_and_differences_are_reported(dataset, tmp_path, capsys):
    report = run_ranks(train_job, 1, options(dataset, tmp_path, "--train.max_steps=6", "--train.eval_every=3"))[0]
    assert main(["--run", str(tmp_path / "run"), "--turns", "1", "--gauc-rows", "100"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 205 and figures["tasks"] == 2
    for mode in ("exact", "bounded"):
        assert 0 < figures[mode]["taking_in_share"] + figures[mode]["computing_share"] < 1
    for found in figures["bounded_less_exact"].values():
        assert abs(found["auc_off"]) <= found["auc_bound"] and found["gauc_share"] < 1
        assert abs(found["logloss_off"]) < 1e-12
    assert report["metrics"] == "exact"


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["--run", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
