"""Run folders: never overwritten, never half-written, read back whole."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.common.whole_files import new_file
from ssr_rec.config.run import load_config
from ssr_rec.runs import folder as run_folder
from ssr_rec.runs.folder import (
    append_jsonl,
    create_run_folder,
    read_metrics,
    write_json,
)
from ssr_rec.runs.open import open_run_folder
from ssr_rec.runs.provenance import git_commit, hardware, versions
from ssr_rec.runs.report import read_report, read_run
from ssr_rec.runs.tracking import TensorBoard


def test_create_makes_the_folder_and_its_parents(tmp_path):
    folder = create_run_folder(tmp_path / "runs", "a")
    assert folder == tmp_path / "runs" / "a" and folder.is_dir()
    assert create_run_folder(tmp_path / "runs", "a") == folder, "an empty folder may be used"


def test_create_refuses_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'a'))} is not empty; choose another name"):
        create_run_folder(tmp_path, "a")


def test_a_folder_whose_process_was_killed_before_its_config_is_as_good_as_new(tmp_path):
    config = {"runs": str(tmp_path), "name": "a", "resume": "auto"}
    (tmp_path / "a").mkdir()
    with new_file(tmp_path / "a" / "config.yaml") as half:
        half.write_text("name: ")
        (tmp_path / "a" / "job").write_text("17 SSR-S")
        folder, goes_on, lock = open_run_folder(config, "run", "SSR-S")
        with pytest.raises(ValueError, match="another process is training this run"):
            open_run_folder(config, "run", "SSR-S")
        os.close(lock)
        assert (folder, goes_on, half.exists()) == (tmp_path / "a", False, False)
        half.touch()  # for new_file to rename
    with pytest.raises(ValueError, match="is not empty"):
        create_run_folder(tmp_path, "a")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/tmp/x", "../../elsewhere", "a\nb", "x" * 300])
def test_a_name_that_leaves_the_runs_folder_is_refused_also_when_resuming(name):
    with pytest.raises(ValueError, match=r"must be (the name of one folder|at most 240 bytes)"):
        load_config(None, [f"--name={name}", "--resume=auto"])


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_runs_that_can_be_no_folder_are_refused(tmp_path, kind):
    runs = tmp_path / "runs"
    runs.symlink_to("/nowhere/at/all") if kind == "broken link" else runs.touch()
    for name in ("a", None):
        with pytest.raises(ValueError, match=f"--runs={re.escape(str(runs))}: cannot make a run folder there"):
            create_run_folder(runs, name)


def test_create_names_a_run_by_the_time_and_twice_in_a_second_differently(tmp_path, monkeypatch):
    assert re.fullmatch(r"ssr_s-\d{8}-\d{6}", create_run_folder(tmp_path, None, "ssr_s").name)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260102-030405")
    names = [create_run_folder(tmp_path, None, "mlp").name for _ in range(3)]
    assert create_run_folder(tmp_path, None, "a/b c+d").name == "a_b_c_d-20260102-030405"
    assert names == ["mlp-20260102-030405", "mlp-20260102-030405-2", "mlp-20260102-030405-3"]


def test_json_is_written_as_plain_numbers_and_null(tmp_path):
    value = {"a": math.nan, "b": np.float32(0.5), "c": torch.tensor(3), "d": [np.int64(1), (math.inf,)], "e": Path("x")}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": 0.5, "c": 3, "d": [1, [None]], "e": "x"} and text.endswith("}\n")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"auc": 0.7})

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"auc": 0.8})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"auc": object()})
    assert json.loads(path.read_text()) == {"auc": 0.7}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def row(step: int, split: str = "train", **more) -> dict:
    return {"step": step, "split": split, **more}


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    rows = [row(1, loss=0.5), row(1, "validation", tasks={"click": {"auc": math.nan}}), row(1, "test")]
    for one in rows:
        append_jsonl(path, one)
    rows[1]["tasks"]["click"]["auc"] = None
    assert read_metrics(path) == rows


def test_a_line_that_a_crash_left_unfinished_is_skipped_and_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, row(1))
    with path.open("a") as file:
        file.write('{"step": 2, "spl')
    assert read_metrics(path) == [row(1)]
    append_jsonl(path, row(3))
    assert read_metrics(path) == [row(1), row(3)]
    only_torn = tmp_path / "torn.jsonl"
    only_torn.write_text('{"st')
    append_jsonl(only_torn, row(1))
    assert read_metrics(only_torn) == [row(1)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\nnot json\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)


@pytest.mark.parametrize(
    "before",
    [
        [row(200), row(200, "validation"), row(300)],
        [row(200), row(200, "validation")],
        [row(200)],
        [row(300, "validation"), row(300), row(300, "test")],
        [row(200, "test")],
    ],
)
def test_rows_repeated_by_a_resumed_run_replace_the_earlier_ones(tmp_path, before):
    path = tmp_path / "metrics.jsonl"
    kept = [row(100), row(100, "validation")]
    again = [row(200, new=True), row(200, "validation", new=True), row(100, "test", new=True)]
    for one in kept + before + again:
        append_jsonl(path, one)
    assert read_metrics(path) == kept + again


def test_report_is_read_and_its_absence_explained(tmp_path):
    with pytest.raises(ValueError, match="no such run folder"):
        read_report(tmp_path / "a")
    with pytest.raises(ValueError, match=r"no report\.json; the run has not finished"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json: not JSON"):
        read_report(tmp_path)
    report = {"name": "a", "over_arch": {}, "test": {}, "dataset": {}}
    append_jsonl(tmp_path / "metrics.jsonl", row(1))
    for wrong, where in [
        ({"test": 1}, "test: Input should be a valid dictionary"),
        ({"test": {"click": {"auc": "high"}}}, r"test\.click\.auc"),
        ({"over_arch": []}, "over_arch"),
        ({"best_step": "9"}, "best_step: Input should be a valid integer"),
        ({"days": [{"day": "1"}]}, r"days\.0\.tasks: Field required"),
    ]:
        write_json(tmp_path / "report.json", report | wrong)
        with pytest.raises(UserError, match=rf"report\.json: {where}[^\n]*; not the report[^\n]*train again$"):
            read_report(tmp_path)
    for text in ("[1]", "null", json.dumps({k: v for k, v in report.items() if k != "dataset"})):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match=r"(dataset: Field required|valid dictionary).*; not the report"):
            read_report(tmp_path)
    older = report | {"samples_per_s": None, "of_another_version": 5, "over_arch": {"kind": "SSR-S", "more": [1]}}
    write_json(tmp_path / "report.json", older)
    found = read_run(tmp_path)
    assert (found.report.values(), found.rows) == (older, [row(1)]), "what older versions lack or have more"


def test_versions_and_hardware_name_what_is_here():
    assert versions()["torch"] == torch.__version__
    assert {"python", "torchrec", "fbgemm_gpu", "cuda"} <= set(versions())
    facts = hardware()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gib"] > 0 and isinstance(facts["gpus"], list)
    json.dumps([versions(), facts])


def test_git_commit_of_clean_changed_and_foreign_folders(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert git_commit(tmp_path) is None
    package = tmp_path / "package"
    package.mkdir()
    (package / "x.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    assert git_commit(package) == head
    (package / "x.py").write_text("2")
    assert git_commit(package) == f"{head}-dirty"
    installed = tmp_path / "venv" / "package"
    shutil.copytree(package, installed)
    assert git_commit(installed) is None, "not tracked: the surrounding checkout says nothing about it"
    monkeypatch.setenv("PATH", "")
    assert git_commit(package) is None


def test_scalars_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path, 0)
    tracker.metrics(row(5, loss=0.5, lr=0.001, tasks={"click": {"auc": 0.75, "gauc": None}}))
    tracker.metrics(row(9, loss=0.25))
    tracker.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr", "train/click/auc"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.5), (9, 0.25)]
