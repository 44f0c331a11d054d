"""Searching settings with a stand-in for training: what is drawn, what survives kills, what is pruned and refused."""

import json
import math
import multiprocessing
import os
import signal
import sys
import time

import optuna
import pytest
import yaml

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.studies.search_space import Tuning, check_tuning, point_of, read_tuning
from ssr_rec.studies.trials import TrialBook
from ssr_rec.studies.tuner import Tuner, best_config
from ssr_rec.studies.tuning_results import draw_tuning, importances, trials_frame, tuning_text

SPACE = {
    "trials": 5,
    "sampler": {"startup_trials": 3},
    "pruner": {"name": "none"},
    "base": {"over_arch": {"name": "mlp", "hidden": [8]}, "train": {"monitor_task": "click"}},
    "search": {
        "optimizer.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "train.batch_size": {"type": "int", "low": 64, "high": 256, "step": 64},
        "over_arch.hidden": [[8], [16, 8]],
    },
}
# Validates as well as the learning rate is near 1e-2; every start leaves a line. MODE is what happens to trial 0.
FAKE = """
import json, math, os, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder = os.path.join(config["runs"], config["name"])
here = os.path.join(config["runs"], "..", "started")
with open(here, "a") as file:
    file.write(json.dumps([config["name"], os.getpid(), len(os.sched_getaffinity(0))]) + "\\n")
os.makedirs(folder, exist_ok=True)
value = 0.8 - 0.05 * abs(math.log10(config["optimizer"]["learning_rate"]) + 2)
mode = os.environ.get("MODE", "") if config["name"] == "0000" else ""
first = sum(json.loads(line)[0] == config["name"] for line in open(here)) == 1
def evaluate(step, value):
    tasks = {"click": {"auc": value, "logloss": 1 - value}, "like": {"auc": 0.5, "logloss": 0.7}}
    with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({"step": step, "split": "validation", "tasks": tasks}) + "\\n")
    return tasks
evaluate(10, value)
if mode == "hang" and first:
    time.sleep(600)
if mode == "killed" or (mode == "killed once" and first):
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "refused":
    sys.exit(2)
if os.environ.get("SLOW") and config["name"] > "0001":
    evaluate(20, 0.1)
    time.sleep(600)
report = {
    "name": config["name"], "over_arch": {}, "dataset": {"dataset_id": "tiny-0"}, "seconds": 1.5, "steps": 20,
    "best_step": 20, "validation": evaluate(20, value + 0.01), "test": {"click": {"auc": 0.1}},
}
json.dump(report, open(os.path.join(folder, "report.json"), "w"))
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake_train.py"
    path.write_text(FAKE)
    return (sys.executable, str(path))


@pytest.fixture
def opened(dataset, tmp_path):
    """Open a search of the space with changes, in the same folder each time."""

    def book(**changes):
        tuning = Tuning.model_validate({**SPACE, **changes})
        schema = Schema.read(dataset)
        first = check_tuning(tuning, schema, str(dataset), "space")
        return TrialBook(tmp_path / "out", tuning, first, schema.dataset_id)

    return book


def started(out):
    path = out / "started"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def value_of(trial):
    """What the stand-in gives a trial in the end."""
    return 0.81 - 0.05 * abs(math.log10(trial.params["optimizer.learning_rate"]) + 2)


@pytest.mark.slow
def test_every_trial_is_a_run_and_the_best_ones_config_trains_it_again(opened, fake, dataset, tmp_path):
    book, lines = opened(), []
    Tuner(book, str(dataset), 2, fake, lines.append).run()
    trials = book.in_state("COMPLETE")
    assert len(trials) == 5 and sorted(name for name, *_ in started(book.out)) == [f"{n:04d}" for n in range(5)]
    assert all(trial.value == pytest.approx(value_of(trial)) for trial in trials)
    assert all(list(trial.intermediate_values) == [10, 20] for trial in trials)
    for trial in trials:
        run = yaml.safe_load((book.out / "configs" / f"{trial.number:04d}.yaml").read_text())
        assert 1e-4 <= run["optimizer"]["learning_rate"] <= 1e-1 and run["train"]["batch_size"] in (64, 128, 192, 256)
        assert run["over_arch"]["hidden"] in ([8], [16, 8]) and run["train"]["monitor_task"] == "click"
    best = max(trials, key=value_of)
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best_config(book, str(dataset)).model_dump(mode="json")))
    config = load_config(tmp_path / "best.yaml")
    assert config.optimizer.learning_rate == best.params["optimizer.learning_rate"] and config.name is None
    assert lines[-1].startswith("[5/5] trial ") and f"of trial {best.number})" in lines[-1]
    assert book.study.best_trial.number == best.number == book.best().number
    # Ended: nothing more is started.
    Tuner(opened(), str(dataset), 2, fake, lines.append).run()
    assert len(started(book.out)) == 5


@pytest.mark.slow
def test_a_null_among_a_list_s_numbers_stays_one_and_they_stay_whole(opened, tmp_path):
    book = opened(search={"train.max_steps": [None, 20000, 30000]}, trials=6)
    while (taken := book.take()) is not None:
        book.end(taken, "COMPLETE", 0.5 + taken.trial.number / 100)
    frame, points = trials_frame(book), [book.point(trial)["train.max_steps"] for trial in book.trials()]
    assert None in points and any(points) and frame["train.max_steps"].tolist() == points
    assert all(f" {point} " in tuning_text(book, frame, {}) for point in points if point)
    draw_tuning(book, frame, {}, "tiny").savefig(tmp_path / "picture.png")


@pytest.mark.slow
def test_results_hold_each_trial_and_the_best_first(opened, fake, dataset, tmp_path):
    book = opened(pruner={"name": "median", "startup_trials": 1})
    Tuner(book, str(dataset), 1, fake, lambda line: None).run()
    frame, shares = trials_frame(book), importances(book)
    assert list(frame["trial"]) == list(range(5)) and set(frame.columns) > set(SPACE["search"])
    text = tuning_text(book, frame, shares)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    values = [float(row.split("|")[3].strip(" *")) for row in rows if "complete" in row]
    assert values == sorted(values, reverse=True) and "**" in rows[0] and len(rows) == 5
    assert shares.keys() == SPACE["search"].keys() and sum(shares.values()) == pytest.approx(1)
    draw_tuning(book, frame, shares, "tiny").savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_killed_worker_s_trial_is_taken_over_as_it_is_and_no_trial_is_lost(opened, fake, dataset, monkeypatch):
    monkeypatch.setenv("MODE", "hang")
    book = opened()
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: Tuner(opened(), str(dataset), 2, fake, lambda line: None).run()
    )
    worker.start()
    deadline = time.monotonic() + 60
    while len(book.in_state("COMPLETE")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    drawn = book.trials()[0].params
    taken = book.take()
    assert taken is None or taken.trial.number != 0, "the training of the killed worker is still at it"
    if taken is not None:
        book.leave(taken)
    os.kill(next(pid for name, pid, _ in started(book.out) if name == "0000"), signal.SIGKILL)
    Tuner(book, str(dataset), 2, fake, lambda line: None).run()
    names = [name for name, *_ in started(book.out)]
    assert len(book.in_state("COMPLETE")) == len(book.trials()) == 5 and names.count("0000") == 2
    assert book.trials()[0].params == drawn and book.trials()[0].intermediate_values.keys() == {10, 20}


@pytest.mark.slow
def test_two_processes_on_one_search_take_different_trials(opened):
    ours, theirs = opened(), opened()
    taken = [ours.take(), theirs.take(), ours.take(), theirs.take(), ours.take()]
    assert [one.trial.number for one in taken] == [0, 1, 2, 3, 4]
    assert len({json.dumps(one.point) for one in taken}) == 5
    assert ours.take() is None and theirs.take() is None
    theirs.leave(taken[1])
    again = ours.take()
    assert again.trial.number == 1 and again.point == taken[1].point


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_draws_depend_on_seed_and_trial_alone(opened, sampler, dataset, tmp_path):
    """The same study told the same values: whether its process was started anew in between does not matter."""
    points = []
    for anew in (False, True):
        book, drawn = opened(sampler={"name": sampler, "startup_trials": 2}), []
        for _ in range(4):
            taken = book.take()
            drawn.append(taken.point)
            book.end(taken, "COMPLETE", taken.point["optimizer.learning_rate"])
            book = opened(sampler={"name": sampler, "startup_trials": 2}) if anew else book
        points.append(drawn)
        (tmp_path / "out").rename(tmp_path / f"out-{anew}")
    assert points[0] == points[1] and len({json.dumps(point) for point in points[0]}) == 4


@pytest.mark.slow
def test_a_trial_far_behind_the_others_is_ended(opened, fake, dataset, monkeypatch):
    monkeypatch.setenv("SLOW", "yes")
    book, lines = opened(trials=3, pruner={"name": "median", "startup_trials": 2, "warmup_steps": 10}), []
    Tuner(book, str(dataset), 1, fake, lines.append).run()
    assert [trial.state.name for trial in book.trials()] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert lines[-1].startswith("[3/3] trial 2  pruned at step 20")
    with pytest.raises(ProcessLookupError):
        os.kill(started(book.out)[-1][1], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "starts", "state"), [("killed once", 2, "COMPLETE"), ("killed", 3, "FAIL"), ("refused", 1, "FAIL")]
)
def test_a_killed_training_is_tried_again_and_a_refused_one_is_not(
    opened, fake, dataset, monkeypatch, mode, starts, state
):
    monkeypatch.setenv("MODE", mode)
    book, lines = opened(trials=2), []
    Tuner(book, str(dataset), 1, fake, lines.append).run()
    assert [name for name, *_ in started(book.out)].count("0000") == starts
    assert [trial.state.name for trial in book.trials()] == [state, "COMPLETE"]
    if state == "FAIL":
        assert "exit code" in trials_frame(book)["problem"][0] and any("0000.log ends" in line for line in lines)


def test_a_trial_by_days_is_worth_the_mean_of_its_days_not_the_best_one(opened, dataset, tmp_path):
    path = tmp_path / "fake_train.py"
    path.write_text(FAKE.replace("0.1}},\n}", "0.1}}, 'days': [{'day': '2', 'tasks': {}}],\n}"))
    book = opened(trials=1)
    Tuner(book, str(dataset), 1, (sys.executable, str(path)), lambda line: None).run()
    assert book.trials()[0].value == 0.1 < max(book.trials()[0].intermediate_values.values())


def test_trials_that_would_end_on_other_days_are_refused(dataset):
    train = {"max_steps": 50, "eval_every": None, "monitor_task": "click"}
    base = {"over_arch": {"name": "mlp"}, "data": {"days": "all"}, "train": train}
    tuning = Tuning.model_validate({**SPACE, "base": base, "search": {"train.batch_size": [64, 128]}})
    with pytest.raises(UserError, match=r"train\.batch_size changes on which day train\.max_steps=50 ends"):
        check_tuning(tuning, Schema.read(dataset), str(dataset), "space.yaml")


@pytest.mark.slow
def test_logloss_is_minimised(opened, fake, dataset):
    book = opened(trials=3, base={**SPACE["base"], "train": {"monitor": "logloss", "monitor_task": "click"}})
    Tuner(book, str(dataset), 1, fake, lambda line: None).run()
    assert book.best().value == min(trial.value for trial in book.trials()) == pytest.approx(1 - value_of(book.best()))
    assert book.study.direction == optuna.study.StudyDirection.MINIMIZE


def test_a_folder_of_another_search_is_refused_and_more_trials_are_not(opened):
    opened()
    assert opened(trials=9).tuning.trials == 9
    with pytest.raises(UserError, match=r"search with seed=0, not 1; choose another --out"):
        opened(seed=1)


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ({"optimizer.lerning_rate": [1e-3, 1e-2]}, "did you mean 'learning_rate'"),
        ({"optimizer.learning_rate": {"type": "float", "low": -1.0, "high": 1.0}}, "optimizer.learning_rate"),
        ({"train.batch_size": {"type": "float", "low": 64, "high": 128}}, "train.batch_size"),
        ({"seed": [0, 1]}, "seed decides what is measured"),
        ({"data.days": ["all", "1..3"]}, "data.days decides what is measured"),
        ({"train": [{"epochs": 1}, {"epochs": 2}]}, "train decides what is measured"),
        ({"runs": ["a", "b"]}, "runs decides what is measured, or where"),
    ],
)
def test_what_no_trial_could_run_is_refused_before_the_first(dataset, search, problem):
    tuning = Tuning.model_validate({**SPACE, "search": search})
    with pytest.raises(UserError, match=problem):
        check_tuning(tuning, Schema.read(dataset), str(dataset), "space.yaml")


@pytest.mark.parametrize(
    ("key", "values"),
    [("train.entire_space", [{}, {"like": "click"}]), ("train.task_weights", [{}, {"like": 0.0}])],
)
def test_a_mean_over_other_tasks_in_every_trial_is_refused(dataset, key, values):
    tuning = Tuning.model_validate({**SPACE, "search": {key: values}, "base": {"over_arch": {"name": "mlp"}}})
    with pytest.raises(UserError, match=rf"{key} changes over which tasks auc is a mean; set train\.monitor_task"):
        check_tuning(tuning, Schema.read(dataset), str(dataset), "space.yaml")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ("{type: float, low: 2.0, high: 1.0}", "low=2.0 is not below high=1.0"),
        ("{type: float, low: 0.0, high: 1.0, log: true}", "log needs low above 0"),
        ("{type: int, low: 1, high: 8, step: 2}", "no step of 2 from low=1 ends at high=8"),
        ("{type: int, low: 2, high: 8, step: 2, log: true}", "log and step"),
        ("{low: 1, high: 2}", "must be a list of values, or"),
        ("[1]", "at least 2 items"),
        ("[1, 1]", "listed twice"),
    ],
)
def test_ranges_that_are_none_are_refused_with_file_and_key(values, problem, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(f"search: {{train.batch_size: {values}}}")
    with pytest.raises(UserError, match=r"space\.yaml: search\.train\.batch_size") as raised:
        read_tuning(path)
    assert problem in str(raised.value)


def test_an_override_takes_a_key_out_of_the_search(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    tuning = read_tuning(path, ["--train.batch_size=64"])
    assert "train.batch_size" not in tuning.search and tuning.base["train"] == {
        "monitor_task": "click",
        "batch_size": 64,
    }
    assert point_of(tuning, {"optimizer.learning_rate": 0.1, "over_arch.hidden": "[16, 8]"}) == {
        "optimizer.learning_rate": 0.1,
        "over_arch.hidden": [16, 8],
    }
    with pytest.raises(UserError, match="sets every key of search"):
        read_tuning(path, ["--train.batch_size=64", "--optimizer.learning_rate=0.1", "--over_arch.hidden=[8]"])
