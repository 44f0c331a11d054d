"""Running a comparison with a stand-in for training: what is started, what is kept, what is refused."""

import json
import os
import signal
import sys
import time

import pytest
import yaml

from ssr_rec.config.run import RunConfig, load_config
from ssr_rec.data.schema import Schema
from ssr_rec.studies.runner import differences, locked, open_comparison, run_comparison
from ssr_rec.studies.study import Job, make_plan
from ssr_rec.studies.study_file import Study

STUDY = {
    "trials": 2,
    "search": {"train.epochs": [1, 2]},
    "systems": {"MLP": {"base": {"over_arch": {"name": "mlp", "hidden": [8]}}}, "SSR": {"baseline": False}},
}
# Trial 1 (two epochs) validates better and tests worse; every start leaves a line with what the process saw.
FAKE = """
import json, os, subprocess, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder = os.path.join(config["runs"], config["name"])
with open(os.path.join(config["runs"], "..", "started"), "a") as file:
    file.write(json.dumps([config["name"], sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"]]) + "\\n")
os.makedirs(folder)
yaml.safe_dump(config, open(os.path.join(folder, "config.yaml"), "w"))
if config["name"] in os.environ.get("HANG", "").split():
    time.sleep(600)
if config["name"] in os.environ.get("ORPHAN", "").split():
    orphan = subprocess.Popen(["sleep", "600"], close_fds=False)
    print(orphan.pid, file=open(os.path.join(config["runs"], "..", "orphan"), "w"))
if config["name"] in os.environ.get("BREAK", "").split():
    sys.exit("the loss is not finite")
good = config["train"]["epochs"] / 10
report = {
    "name": config["name"], "over_arch": {"num_parameters": 10, "flops_per_sample": 20}, "samples_per_s": 1000.0,
    "dataset": {"dataset_id": "tiny-0"}, "seed": config["seed"],
    "validation": {t: {"auc": 0.6 + good} for t in ("click", "like")},
    "test": {t: {"auc": 0.9 - good + config["seed"] / 100, "logloss": 0.5} for t in ("click", "like")},
}
json.dump(report, open(os.path.join(folder, "report.json"), "w"))
"""
ALL = ["mlp-t0-s0", "ssr-t0-s0", "mlp-t1-s0", "ssr-t1-s0", "mlp-t1-s1", "ssr-t1-s1"]


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake_train.py"
    path.write_text(FAKE)
    return (sys.executable, str(path))


@pytest.fixture
def plan(dataset):
    return make_plan(Study.model_validate(STUDY), Schema.read(dataset), str(dataset), seeds=2)


def started(out):
    path = out / "started"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def names(out):
    return [name for name, *_ in started(out)]


def test_runs_in_order_each_on_one_core_and_the_second_call_starts_nothing(plan, fake, tmp_path):
    out, lines = tmp_path / "out", []
    comparison = open_comparison(plan, out)
    run_comparison(comparison, 1, fake, lines.append)
    assert names(out) == ALL, "trials of all systems first, then the seeds of the trial that validates best"
    assert all(len(cores) == 1 and threads == "1" for _, cores, threads in started(out))
    assert comparison.failed == set() and sorted(job.name for job in comparison.reports) == sorted(ALL)
    assert comparison.workers == dict.fromkeys(ALL, 1)
    assert lines[0].startswith("[1/6] MLP  trial 0  seed 0  validation auc click .7000, like .7000  1.00k samples/s  ")
    assert lines[-1].startswith("[6/6] SSR  trial 1  seed 1") and lines[-1].endswith("eta 0s")

    again = open_comparison(plan, out)
    assert again.todo() == [] and again.reports == comparison.reports and again.workers == comparison.workers
    run_comparison(again, 1, fake, lines.append)
    assert len(lines) == 6 and names(out) == ALL


def test_several_workers_run_at_the_same_time_on_cores_of_their_own(plan, fake, tmp_path, monkeypatch):
    """The two systems' first runs wait for each other, so one at a time would never end."""
    out, script = tmp_path / "out", tmp_path / "fake_train.py"
    wait = """
if config["name"].endswith("t0-s0"):
    open(folder + ".here", "w").close()
    while sum(name.endswith(".here") for name in os.listdir(config["runs"])) < 2:
        time.sleep(0.01)
"""
    script.write_text(FAKE.replace("good = ", wait + "good = "))
    run_comparison(open_comparison(plan, out), 2, fake, lambda line: None)
    assert sorted(names(out)) == sorted(ALL)
    usable = len(os.sched_getaffinity(0))
    assert len({tuple(cores) for _, cores, _ in started(out)}) == min(2, usable)
    assert len(os.sched_getaffinity(0)) == usable, "this process keeps its cores"


def test_a_killed_run_is_done_again_and_the_finished_ones_are_not(plan, fake, tmp_path):
    out = tmp_path / "out"
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    killed = out / "runs" / "ssr-t0-s0"
    (killed / "report.json").unlink()
    (killed / "leftover").touch()
    (out / "runs" / "ssr-t0-s0-search").mkdir()
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    assert names(out) == [*ALL, "ssr-t0-s0"]
    assert (killed / "report.json").is_file() and not (killed / "leftover").exists()
    assert not (out / "runs" / "ssr-t0-s0-search").exists()


@pytest.mark.slow
def test_a_failing_run_is_shown_and_the_others_go_on(plan, fake, tmp_path, monkeypatch):
    out, lines = tmp_path / "out", []
    monkeypatch.setenv("BREAK", "ssr-t1-s0")
    comparison = open_comparison(plan, out)
    run_comparison(comparison, 1, fake, lines.append)
    assert comparison.failed == {Job("SSR", 1, 0)}
    assert names(out) == ["mlp-t0-s0", "ssr-t0-s0", "mlp-t1-s0", "ssr-t1-s0", "ssr-t0-s1", "mlp-t1-s1"]
    said = "\n".join(lines)
    assert "SSR  trial 1  seed 0  FAILED" in said and "exit code 1" in said and "| the loss is not finite" in said
    assert (out / "logs" / "ssr-t1-s0.log").read_text() == "the loss is not finite\n"

    monkeypatch.delenv("BREAK")
    again = open_comparison(plan, out)
    run_comparison(again, 1, fake, lines.append)
    assert names(out)[6:] == ["ssr-t1-s0", "ssr-t1-s1"], "the repaired trial wins, so its other seed is needed now"
    assert again.failed == set() and len(plan.final_jobs("SSR", again.reports)) == 2


def test_a_run_that_ends_well_without_a_report_has_failed(plan, tmp_path):
    comparison = open_comparison(plan, tmp_path / "out")
    run_comparison(comparison, 2, (sys.executable, "-c", ""), lambda line: None)
    assert comparison.failed == {job for job in plan.all_jobs() if job.seed == 0} and comparison.reports == {}


def test_a_finished_run_with_another_config_is_refused(plan, fake, dataset, tmp_path):
    out = tmp_path / "out"
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    other = make_plan(
        Study.model_validate(STUDY), Schema.read(dataset), str(dataset), 2, overrides=["--train.batch_size=7"]
    )
    with pytest.raises(ValueError, match=r"mlp-t0-s0 is a run with train.batch_size=1024, not 7; choose another --out"):
        open_comparison(other, out)
    assert names(out) == ALL


def test_a_finished_run_on_another_dataset_is_refused_and_another_path_to_the_same_is_not(
    plan, fake, dataset, tmp_path
):
    out = tmp_path / "out"
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    study, schema = Study.model_validate(STUDY), Schema.read(dataset)
    moved = make_plan(study, schema, "elsewhere", 2)
    assert open_comparison(moved, out).todo() == []
    prepared_again = make_plan(study, schema.model_copy(update={"dataset_id": "new"}), str(dataset), 2)
    with pytest.raises(ValueError, match="mlp-t0-s0 is a run on dataset tiny-0, not on new; choose another --out"):
        open_comparison(prepared_again, out)


def test_a_config_that_this_code_does_not_read_is_refused(plan, fake, tmp_path):
    out = tmp_path / "out"
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    (out / "runs" / "ssr-t0-s0" / "config.yaml").write_text("train: {old_key: 3}\n")
    with pytest.raises(ValueError, match=r"ssr-t0-s0/config.yaml: unknown key 'train.old_key'.*choose another --out"):
        open_comparison(plan, out)


def test_a_run_of_two_stages_is_compared_by_what_was_asked_for(plan, fake, tmp_path):
    """The first stage's folder has the wanted config; the second's has what the first one found."""
    out = tmp_path / "out"
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    run, search = out / "runs" / "mlp-t0-s0", out / "runs" / "mlp-t0-s0-search"
    search.mkdir()
    (search / "config.yaml").write_text((run / "config.yaml").read_text())
    found = yaml.safe_load((run / "config.yaml").read_text())
    found["over_arch"]["hidden"] = [4]
    (run / "config.yaml").write_text(yaml.safe_dump(found))
    assert open_comparison(plan, out).todo() == []
    (search / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ValueError, match=r"over_arch.hidden=\[4\], not \[8\]"):
        open_comparison(plan, out)


def test_differences_name_every_key_but_where_things_lie():
    saved = load_config(None, ["--name=a", "--runs=b", "--data.path=c", "--embeddings.dims={user: 8}"])
    assert differences(saved, RunConfig()) == ["embeddings.dims.user=8, not None", "embeddings.dims=None, not {}"]
    assert differences(RunConfig(name="x"), RunConfig()) == []
    assert differences(RunConfig(seed=1), RunConfig()) == ["seed=1, not 0"]
    other = load_config(None, ["--over_arch.name=mlp"])
    assert "over_arch.name='mlp', not 'ssr'" in differences(other, RunConfig())


def test_two_comparisons_in_one_folder_are_refused(plan, fake, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out), pytest.raises(ValueError, match="runs are still going on there"):
        run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    assert len(names(out)) == 6


@pytest.mark.slow
def test_stopping_stops_the_runs_and_keeps_the_finished_ones(plan, fake, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("HANG", "mlp-t1-s0")

    class Stop(Exception):
        pass

    def stop_at_third(line):
        # Two runs at a time: the third line comes while the hanging run goes on.
        if line.startswith("[3/6]"):
            raise Stop

    began = time.monotonic()
    with pytest.raises(Stop):
        run_comparison(open_comparison(plan, out), 2, fake, stop_at_third)
    assert time.monotonic() - began < 60
    monkeypatch.delenv("HANG")
    again = open_comparison(plan, out)
    assert len(again.reports) == 3, "what has finished stays"
    run_comparison(again, 2, fake, lambda line: None)
    assert again.todo() == [] and len(again.reports) == 6
    assert names(out).count("mlp-t1-s0") == 2


def test_what_a_killed_comparison_left_running_keeps_the_folder(plan, fake, tmp_path, monkeypatch):
    """A comparison killed outright cannot stop its runs; the next one must not remove folders under them."""
    out = tmp_path / "out"
    monkeypatch.setenv("ORPHAN", "ssr-t0-s0")
    run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    (out / "runs" / "mlp-t0-s0" / "report.json").unlink()
    orphan = int((out / "orphan").read_text())
    try:
        with pytest.raises(ValueError, match="runs are still going on there"):
            run_comparison(open_comparison(plan, out), 1, fake, lambda line: None)
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert names(out) == ALL
