"""Trackers get what a run logs, and their faults do not reach it."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.config.same_run import check_same_run
from ssr_rec.runs import tracking
from ssr_rec.runs.tracking import Apart, Trackers, check_trackers
from tests.jobs import train_job
from tests.ranks import run_ranks

ROW = {"step": 5, "split": "train", "loss": 0.5, "tasks": {"click": {"auc": 0.75, "gauc": None}}}


class Recorder:
    """A tracker that keeps what it gets, and raises at the call of a name."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at, self.thread = [], fails_at, threading.current_thread()

    def _note(self, name, value):
        self.calls.append((name, value))
        if name == self.fails_at:
            raise ConnectionError("the server\nis gone")

    def params(self, values):
        self._note("params", values)

    def metrics(self, row):
        self._note("metrics", row)

    def artifacts(self, paths):
        self._note("artifacts", paths)

    def close(self, how):
        self._note("close", how)


def send_all(tracker):
    tracker.params({"seed": 0})
    for step in range(20):
        tracker.metrics({**ROW, "step": step})
    tracker.artifacts([Path("report.json")])
    tracker.close("finished")


def test_everything_arrives_in_order_and_in_another_thread():
    recorder = []
    send_all(Apart("it", lambda: recorder.append(Recorder()) or recorder[0]))
    names = [name for name, _ in recorder[0].calls]
    assert names == ["params", *["metrics"] * 20, "artifacts", "close"]
    assert [row["step"] for name, row in recorder[0].calls if name == "metrics"] == list(range(20))
    assert recorder[0].calls[-1] == ("close", "finished") and recorder[0].thread is not threading.current_thread()


@pytest.mark.parametrize("where", ["open", "params", "metrics", "artifacts", "close"])
def test_a_fault_is_said_once_and_goes_no_further(where, caplog):
    def open_it():
        if where == "open":
            raise ConnectionError("the server\nis gone")
        return Recorder(where)

    with caplog.at_level(logging.WARNING):
        send_all(Apart("it", open_it))
    assert [record.getMessage() for record in caplog.records] == [
        "tracking in it ended (ConnectionError: the server is gone); the run goes on, its folder has everything"
    ]


def test_a_library_that_ends_its_thread_is_a_fault_as_any_other(caplog):
    with caplog.at_level(logging.WARNING):
        send_all(Apart("it", lambda: sys.exit("no account")))
    assert ["(SystemExit: no account)" in record.getMessage() for record in caplog.records] == [True]


def test_a_server_that_hangs_does_not_hold_up_the_run(caplog, monkeypatch):
    monkeypatch.setattr(tracking, "SECONDS_TO_SEND", 0.05)
    answers = threading.Event()
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        send_all(Apart("it", lambda: answers.wait(60) and Recorder()))
        assert time.monotonic() - began < 10
        monkeypatch.setattr(tracking, "MOST_WAITING", 3)
        send_all(Apart("it", lambda: answers.wait(60) and Recorder()))
    answers.set()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "not sent 0 s after the end" in said[0] and "3 messages are waiting" in said[1]


def test_a_library_that_is_not_there_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "mlflow" else object())
    config = load_config(None, ["--track.to=[tensorboard, mlflow]"])
    with pytest.raises(UserError, match=r"track.to: mlflow is not installed; pip install 'ssr_rec\[track\]'"):
        check_trackers(config)
    check_trackers(load_config(None, ["--track.to=[wandb]"]))


def test_no_password_reaches_a_run_folder_and_a_resumed_run_may_be_tracked_elsewhere():
    with pytest.raises(UserError, match=r"track\.mlflow_uri: must not hold a password"):
        load_config(None, ["--track.mlflow_uri=https://me:secret@host"])
    old, new = load_config(None), load_config(None, ["--track.to=[]"])
    check_same_run(new.model_dump(mode="json"), old.model_dump(mode="json"), "")


def test_without_trackers_there_is_no_folder_of_theirs(tmp_path):
    trackers = Trackers(load_config(None, ["--track.to=[]"]), tmp_path, 0)
    trackers.metrics(ROW)
    trackers.finish([])
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """A server of one process on this machine, with a store of its own."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "files")]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def small_run(dataset, tmp_path, *more):
    model = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=4"]
    rows = ["--train.batch_size=256", "--train.eval_every=2", "--train.log_every=1"]
    return [f"--data.path={dataset}", f"--runs={tmp_path}", "--name=tracked", *model, *rows, *more]


@pytest.mark.slow
def test_a_run_of_two_ranks_is_one_run_of_a_server(dataset, tmp_path, mlflow_server):
    from mlflow.tracking import MlflowClient

    more = ["--track.to=[mlflow]", f"--track.mlflow_uri={mlflow_server}", "--track.project=two ranks"]
    report = run_ranks(train_job, 2, small_run(dataset, tmp_path, *more), None, True)[0]
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("two ranks")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert run.data.params["train.batch_size"] == "256" and run.data.params["over_arch.hidden"] == "[8]"
    assert run.data.metrics["test/click/auc"] == pytest.approx(report["test"]["click"]["auc"])
    history = client.get_metric_history(run.info.run_id, "validation/click/auc")
    assert [value.step for value in history] == [2, 4]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "metrics.jsonl", "report.json", "curves.png"}
    assert not (tmp_path / "tracked" / "tensorboard").exists()


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path, mlflow_server):
    from mlflow.tracking import MlflowClient

    from ssr_rec.runs.track_mlflow import Mlflow

    first = Mlflow(tmp_path, "resumed", mlflow_server)
    first.params({"train.epochs": 1, "seed": 0})
    first.metrics(ROW)
    first.close("stopped")
    client = MlflowClient(mlflow_server)
    assert client.get_run(first.run_id).info.status == "KILLED"
    again = Mlflow(tmp_path, "resumed", mlflow_server)
    again.params({"train.epochs": 2, "seed": 0, "new.key": "x"})
    again.metrics({**ROW, "step": 6, "loss": 0.25})
    assert client.get_run(again.run_id).info.status == "RUNNING"
    again.close("finished")
    (run,) = client.search_runs([client.get_experiment_by_name("resumed").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"train.epochs": "1", "seed": "0", "new.key": "x"}
    assert run.data.tags["resumed.train.epochs"] == "2" and "resumed.seed" not in run.data.tags
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(value.step, value.value) for value in history] == [(5, 0.5), (6, 0.25)]


@pytest.mark.slow
def test_a_server_that_is_not_there_costs_a_line_and_no_run(dataset, tmp_path):
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(tracking.__file__).parents[1] / "train.py"
    options = small_run(dataset, tmp_path, "--track.to=[mlflow]", f"--track.mlflow_uri=http://127.0.0.1:{port}")
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env={**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("tracking in MLflow ended") == 1
    assert (tmp_path / "tracked" / "report.json").is_file()


@pytest.mark.slow
def test_weights_and_biases_offline(dataset, tmp_path):
    pytest.importorskip("wandb")
    run_ranks(train_job, 1, small_run(dataset, tmp_path, "--track.to=[wandb]"))
    folder = tmp_path / "tracked"
    (kept,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stem == f"run-{(folder / 'wandb_run').read_text().strip()}" and kept.stat().st_size > 1_000
