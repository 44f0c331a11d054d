"""The command line of tools/show_runs.py."""

import importlib.util
from pathlib import Path

import pytest

from ssr_rec.runs.folder import append_jsonl, write_json

SCRIPT = Path(__file__).parents[2] / "tools" / "show_runs.py"


@pytest.fixture(scope="module")
def show_runs():
    spec = importlib.util.spec_from_file_location("show_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """Two finished runs and one that is not."""
    for name, auc in (("mlp", 0.71), ("ssr_s", 0.72)):
        (tmp_path / name).mkdir()
        report = {
            "name": name,
            "over_arch": {"kind": name.upper(), "num_parameters": 100, "flops_per_sample": 200},
            "test": {"click": {"auc": auc, "logloss": 0.5}},
            "ceiling": {"click": {"auc": 0.76, "logloss": 0.4}},
            "dataset": {"name": "synthetic", "dataset_id": "x"},
        }
        write_json(tmp_path / name / "report.json", report)
        row = {"step": 1, "samples": 10, "split": "validation", "tasks": {"click": {"auc": auc}}}
        append_jsonl(tmp_path / name / "metrics.jsonl", row)
    (tmp_path / "unfinished").mkdir()
    return tmp_path


def test_table_sentence_and_picture(show_runs, runs, capsys):
    assert show_runs.main([str(runs / "mlp"), str(runs / "ssr_s"), "--plot", str(runs / "runs.png")]) == 0
    out = capsys.readouterr().out
    assert "| SSR_S     |    100 |          200 |     .7200 |         .5000 |         - |" in out
    assert out.splitlines()[-1].startswith("SSR_S reaches .7200 click AUC, +.0100 over MLP; that is 84.6 %")
    assert (runs / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, complaint", [("unfinished", "no report.json; the run has not finished"), ("nothing", "no such run folder")]
)
def test_a_missing_or_unfinished_run_is_one_line_and_exit_code_2(show_runs, runs, capsys, name, complaint):
    assert show_runs.main([str(runs / "mlp"), str(runs / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("show_runs: ") and complaint in captured.err


def test_a_picture_that_cannot_be_written_is_one_line_and_exit_code_2(show_runs, runs, capsys):
    assert show_runs.main([str(runs / "mlp"), "--plot", str(runs / "nowhere" / "runs.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
