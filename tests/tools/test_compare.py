"""The command line of tools/compare.py, with real training once."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import yaml

from ssr_rec.studies.study_file import read_study

SCRIPT = Path(__file__).parents[2] / "tools" / "compare.py"
STUDY = """
trials: 2
base:
  embeddings: {dim: 4}
  train: {batch_size: 256, max_steps: 2, eval_every: 2}
search: {optimizer.learning_rate: [1e-3, 1e-2]}
systems:
  Dense MLP: {base: {over_arch: {name: mlp, hidden: [8]}}}
  SSR-S: {baseline: false, base: {over_arch: {name: ssr, num_views: 2, view_dim: 4, num_layers: 1}}}
"""


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(dataset, tmp_path):
    (tmp_path / "small.yaml").write_text(STUDY)
    options = ["--data", str(dataset), "--study", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]
    return [*options, "--seeds", "2"]


@pytest.mark.slow
def test_two_systems_two_trials_two_seeds(compare, arguments, tmp_path, capsys):
    assert compare.main(arguments) == 0
    captured = capsys.readouterr()
    out = tmp_path / "out"
    assert len([line for line in captured.err.splitlines() if line.startswith("[")]) == 6
    text = (out / "table.md").read_text()
    assert text.strip() == captured.out.strip()
    assert "### click" in text and "### like" in text and "GAUC" in text and "†" not in text
    table, runs = pd.read_csv(out / "table.csv"), pd.read_csv(out / "runs.csv")
    assert len(table) == 4 and set(table["seeds"]) == {2} and set(table["trials"]) == {2}
    assert len(runs) == 6 and runs["finished"].all() and sorted(runs["seed"]) == [0, 0, 0, 0, 1, 1]
    assert runs.groupby("system")["optimizer.learning_rate"].nunique().to_dict() == {"Dense MLP": 2, "SSR-S": 2}
    # The winner is the one that validates best, and the table has its figures.
    for system, trials in runs[runs["seed"] == 0].groupby("system"):
        means = (trials["validation/click/auc"] + trials["validation/like/auc"]) / 2
        winner = trials.loc[means.idxmax()]
        row = table[(table["system"] == system) & (table["task"] == "like")].iloc[0]
        assert (row["winner"], row["auc_seed0"]) == (winner["trial"], pytest.approx(winner["test/like/auc"], abs=1e-12))
    assert (out / "auc_vs_cost.png").read_bytes().startswith(b"\x89PNG")
    assert list(read_study(out / "study.yaml").systems) == ["Dense MLP", "SSR-S"]

    # Again, from the resolved study: nothing is run, the same table comes out.
    again = [out / "study.yaml" if argument.endswith("small.yaml") else argument for argument in arguments]
    assert compare.main([*map(str, again)]) == 0
    captured = capsys.readouterr()
    assert "6 runs, 6 of them there" in captured.err and captured.out.strip() == text.strip()
    # With another setting the finished runs are another experiment's.
    assert compare.main([*arguments, "--train.max_steps=3"]) == 2
    assert "train.max_steps=2, not 3; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_failing_runs_end_with_exit_code_1_and_a_table_of_the_others(compare, arguments, tmp_path, capsys):
    fake = tmp_path / "fake.py"
    fake.write_text(
        """
import json, pathlib, sys, yaml
config = yaml.safe_load(open(sys.argv[-1]))
if config["over_arch"]["name"] == "ssr":
    sys.exit("error: out of memory")
folder = pathlib.Path(config["runs"], config["name"])
folder.mkdir()
(folder / "config.yaml").write_text(yaml.safe_dump(config))
metrics = {task: {"auc": 0.7, "logloss": 0.5} for task in ("click", "like")}
report = {"name": "x", "over_arch": {"num_parameters": 9, "flops_per_sample": 9}, "samples_per_s": 1.0}
report |= {"dataset": {"dataset_id": "tiny-0"}, "validation": metrics, "test": metrics}
(folder / "report.json").write_text(json.dumps(report))
"""
    )
    command = (compare.sys.executable, str(fake))
    assert compare.main([*arguments, "--trials", "1"], command) == 1
    captured = capsys.readouterr()
    assert "SSR-S  trial 0  seed 0  FAILED" in captured.err and "| error: out of memory" in captured.err
    assert "† SSR-S: only 0 of 1 trials and 0 of 2 seeds finished." in captured.out
    assert "Dense MLP leads with .7000 test AUC." in captured.out
    # Redrawn from what there is, with nothing started.
    assert compare.main([*arguments, "--trials", "1", "--only-table"], ("false",)) == 0
    assert capsys.readouterr().out == captured.out


def test_defaults(compare, dataset, tmp_path, monkeypatch, capsys):
    """The folder is named by study and dataset; all systems; three seeds."""
    (tmp_path / "small.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--data", str(dataset), "--study", "small.yaml", "--workers", "3"], ("false",)) == 2
    captured = capsys.readouterr()
    assert "2 systems, 8 runs, 0 of them there; runs/compare-small-tiny" in captured.err
    assert captured.err.strip().endswith("error: no run has finished, so there is nothing to tabulate")
    assert yaml.safe_load(Path("runs/compare-small-tiny/configs/ssr_s-t0-s0.yaml").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--only-table"], "error: no run has finished"),
        (["--seed=1"], "seed is not the study's to set; use --seeds"),
        (["--trian.epochs=1"], "unknown key 'trian'; did you mean 'train'?"),
        (["--over-archs", "SSR-S", "AFN"], "has no system 'AFN'; it has Dense MLP, SSR-S"),
        (["--data", "nowhere"], "nowhere/schema.json: no such file; prepare the dataset"),
        (["--study", "nowhere.yaml"], "nowhere.yaml: No such file or directory; name a study"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(compare, arguments, tmp_path, capsys, more, complaint):
    assert compare.main([*arguments, *more], ("false",)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and complaint in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--seeds", "--trials", "--workers"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_counts_are_whole_numbers_of_one_or_more(compare, arguments, option, value, capsys):
    with pytest.raises(SystemExit) as refusal:
        compare.main([*arguments, f"{option}={value}"])
    assert refusal.value.code == 2 and "whole number of 1 or more" in capsys.readouterr().err
