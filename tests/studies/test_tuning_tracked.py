"""What MLflow says of the trials of a search whose trainings were killed: by the pruner, or by something else."""

import sys

import pytest

from ssr_rec.studies.tuner import Tuner
from tests.studies.test_tuning import FAKE, SPACE, opened

__all__ = ["opened"]  # a fixture
TRACKED = """
from pathlib import Path
from ssr_rec.runs.track_mlflow import Mlflow
tracker = Mlflow(Path(folder), "search", config["track"]["mlflow_uri"])
evaluate(10, value)
"""


@pytest.mark.slow
def test_no_run_of_a_trial_that_ended_stays_running_in_mlflow(opened, dataset, tmp_path, monkeypatch):
    """Trial 0 is killed at each of its three starts, trial 1 ends well, trial 2 hangs and is pruned."""
    tracking = pytest.importorskip("mlflow.tracking")
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE.replace("evaluate(10, value)\n", TRACKED, 1) + 'tracker.close("finished")\n')
    monkeypatch.setenv("MODE", "killed")
    monkeypatch.setenv("SLOW", "yes")
    store = f"sqlite:///{tmp_path}/store.db"
    base = {**SPACE["base"], "track": {"to": ["mlflow"], "mlflow_uri": store}}
    book = opened(trials=3, base=base, pruner={"name": "median", "startup_trials": 1, "warmup_steps": 10})
    Tuner(book, str(dataset), 1, (sys.executable, str(script)), lambda line: None).run()
    assert [trial.state.name for trial in book.trials()] == ["FAIL", "COMPLETE", "PRUNED"]
    client = tracking.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("search").experiment_id])
    ends = {run.info.run_name: (run.info.status, run.data.tags["ssr_rec.ended"]) for run in runs}
    assert len(runs) == 3, "a trial that was started again went on in its run"
    assert ends == {"0000": ("FAILED", "failed"), "0001": ("FINISHED", "finished"), "0002": ("KILLED", "pruned")}
