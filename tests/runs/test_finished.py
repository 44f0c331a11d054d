"""The same command again after a run has finished, beside one that is on, and after a launcher's id was used before."""

import contextlib
import fcntl
import io
import json
import os
from pathlib import Path

import pytest

from ssr_rec.config.run import dump_config, load_config
from ssr_rec.runs.open import Opened, finished_report, open_run_folder
from ssr_rec.runs.report import Report, write_report
from tests.checkpointing.test_resume import options
from tests.jobs import refused_job, train_job
from tests.ranks import run_ranks

SHORT = ["--train.max_steps=6", "--train.eval_every=3"]


def telling_job(overrides: list[str]) -> tuple[dict, str]:
    """The report, and what this rank prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        report = train_job(overrides, with_curves=True)
    return report, said.getvalue()


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> tuple[Path, dict]:
    runs = tmp_path_factory.mktemp("finished")
    return runs, run_ranks(train_job, 1, options(dataset, runs, *SHORT))[0]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_finished_run_gives_its_report_again(dataset, finished, world_size):
    runs, report = finished
    before = (runs / "run" / "metrics.jsonl").read_bytes()
    (runs / "run" / "curves.png").unlink(missing_ok=True)  # as a kill after the report leaves it
    ranks = run_ranks(telling_job, world_size, options(dataset, runs, *SHORT))
    for again, _ in ranks:
        assert again == json.loads((runs / "run" / "report.json").read_text()) and again["test"] == report["test"]
    assert (runs / "run" / "metrics.jsonl").read_bytes() == before
    assert (runs / "run" / "curves.png").stat().st_size > 10_000
    assert f"report {runs}/run/report.json" in ranks[0][1] and not any(said for _, said in ranks[1:])


def test_a_picture_that_cannot_be_drawn_is_a_warning(dataset, finished):
    runs, _ = finished
    (runs / "run" / "curves.png").unlink(missing_ok=True)
    (runs / "run" / "curves.png").mkdir()
    try:
        ((_, said),) = run_ranks(telling_job, 1, options(dataset, runs, *SHORT))
    finally:
        (runs / "run" / "curves.png").rmdir()
    assert "curves.png: not drawn: IsADirectoryError" in said and "pictures none" in said


def test_a_finished_run_is_no_answer_to_another_command(dataset, finished):
    runs, _ = finished
    for more in (["--train.max_steps=9"], ["--seed=7"], ["--resume=never"]):
        said = run_ranks(refused_job, 1, options(dataset, runs, *SHORT, *more))[0]
        assert "is not empty; choose another name" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_process_is_kept_out_of_a_run_folder(dataset, tmp_path, world_size):
    runs = tmp_path / "runs"
    run_ranks(train_job, 1, options(dataset, runs, *SHORT))
    (runs / "run" / "report.json").unlink()  # as before its end
    handle = os.open(runs / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for said in run_ranks(refused_job, world_size, options(dataset, runs, *SHORT)):
        assert said.endswith("another process is training this run; wait for it to end, or choose another --name")
    os.close(handle)
    assert run_ranks(train_job, 1, options(dataset, runs, *SHORT))[0]["steps"] == 6
    handle = os.open(runs / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was given back
    os.close(handle)


def test_a_launchers_id_may_be_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job8")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)

    def opened(*more: str) -> Opened:
        config = load_config(None, [f"--runs={tmp_path}", *more])
        found = open_run_folder(config.model_dump(mode="json"), "log-ssr", "SSR-S")
        os.close(found.lock)
        (found.folder / "config.yaml").write_text(dump_config(config))
        return found

    first = opened()
    again = opened()
    assert (again.folder, again.goes_on) == (first.folder, True), "an unfinished run of the job goes on"
    other = opened("--seed=5")
    assert other.folder != first.folder and not other.goes_on, "another config is another job"
    report = Report.model_validate({"name": first.folder.name, "over_arch": {}, "test": {}, "dataset": {}})
    write_report(first.folder, report)
    config = load_config(None, [f"--runs={tmp_path}"]).model_dump(mode="json")
    assert finished_report(config, "SSR-S") is None, "a new job with the id of a finished one trains"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert finished_report(config, "SSR-S") == report, "restarted after its report, a job has finished"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert opened().folder not in (first.folder, other.folder)


def test_the_test_row_names_the_step_of_its_weights(finished):
    runs, report = finished
    rows = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
    (tested,) = [row for row in rows if row["split"] == "test"]
    assert tested["step"] == report["best_step"]
