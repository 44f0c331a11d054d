"""Artifacts of prepared logs know what training's values were like; runs by days export, too."""

import shutil
from pathlib import Path

import pytest
import torch

from ssr_rec.checkpointing.format import read_checkpoint
from ssr_rec.common.errors import UserError
from ssr_rec.serving.artifact import Manifest, read_manifest
from ssr_rec.serving.export import Compared, _described, export_run
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import latest_of_days, restore_model
from tests.days_log import options, write_days
from tests.jobs import train_job
from tests.made_run import make_run
from tests.prepare_log import make_rows, run, spec_with, write_csv
from tests.ranks import run_ranks
from tests.serving.test_value_shares import looped

NORM = ["--over_arch.input_norm=per_dim"]
MLP = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=8"]
ROWS = make_rows(2000)


@pytest.mark.slow
def test_an_artifact_warns_of_columns_unlike_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schema, stored = run(tmp_path, [write_csv(ROWS, tmp_path / "a.csv")], spec_with())
    features = ["price", "city", "tags"]
    export_run(make_run(tmp_path / "run", tmp_path / "out", [*MLP, f"--data.features={features}"]), tmp_path / "made")
    trained = read_manifest(tmp_path / "made").trained_values
    assert {name: found.model_dump() for name, found in trained.items()} == {
        name: looped(stored["train"], schema, name) for name in features
    }
    same, other = load(tmp_path / "made"), load(tmp_path / "made")
    caplog.clear()
    same.predict(ROWS)
    assert not caplog.records
    other.predict([{**row, "city": f"c {row['city']}"} for row in ROWS])
    assert [record.getMessage().partition(" values")[0] for record in caplog.records] == ["city: 100.0% of 2,000"]


@pytest.mark.slow
def test_a_run_by_days_exports_its_latest_weights(tmp_path: Path) -> None:
    spec = spec_with(split={"type": "days", "column": "day", "fit_days": 3})
    rows = [row for row in ROWS if row["day"] < "2024-01-07"]
    schema, stored = run(tmp_path, [write_csv(rows, tmp_path / "a.csv")], spec)
    assert schema.days is not None
    first, last = schema.days.names[1], schema.days.names[4]
    days = [f"--data.days={first}..{last}", "--data.features=[user, city]"]
    asked = options(tmp_path / "out", tmp_path, *days, "--optimizer.ema_decay=0.9", *NORM)
    run_ranks(train_job, 2, asked)
    report = export_run(tmp_path / "run", tmp_path / "made")
    manifest = read_manifest(tmp_path / "made")
    assert manifest.source["checkpoint"].startswith("step-") and manifest.source["run"] == "run"
    trained = [row for day in schema.days.names[1:5] for row in stored[day]]
    assert manifest.trained_values["city"].model_dump() == looped(trained, schema, "city")
    assert (report["parity"]["split"], report["parity"]["rows"]) == (last, len(stored[last]))
    load(tmp_path / "made").predict(rows)
    with pytest.raises(UserError, match="split 'test': the dataset has 2024-01-01, 2024-01-02"):
        export_run(tmp_path / "run", tmp_path / "made", compared=Compared("test"))
    checkpoints = tmp_path / "run/checkpoints"
    latest = restore_model(latest_of_days(tmp_path / "run")).model.state_dict()
    name = "dense.over_arch.input_norm.running_mean"
    of_ranks = {f"rank{rank}/model.{name}": torch.empty_like(latest[name]) for rank in range(2)}
    read_checkpoint(of_ranks, latest_of_days(tmp_path / "run"))
    torch.testing.assert_close(latest[name], sum(of_ranks.values()) / 2)
    for folder in checkpoints.glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no training checkpoint .* those of its easiest day"):
        export_run(tmp_path / "run", tmp_path / "made")


@pytest.mark.slow
def test_a_training_checkpoint_gives_the_weights_that_an_evaluation_used(tmp_path: Path) -> None:
    """The best weights are written as they were evaluated; the checkpoint of the same step has them in other names."""
    data = write_days(tmp_path / "data")
    # Five steps a day, and six of the third.
    kept = ["--data.days=..2024-03-01", "--checkpoint.every_steps=5", "--checkpoint.keep=9"]
    run_ranks(train_job, 1, options(data, tmp_path, *kept, "--optimizer.ema_decay=0.9", *NORM))
    best = restore_model(tmp_path / "run")
    step = best.checkpoint.name.removeprefix("best-")
    same = restore_model(best.checkpoint.with_name(f"step-{step}"))
    other = latest_of_days(tmp_path / "run")
    assert other.name > same.checkpoint.name
    states = [found.model.state_dict() for found in (best, same, restore_model(other))]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert ".indices" in name or not torch.equal(value, states[2][name]), name
    described = _described(best, "run", "2024-03-03", 0.0)
    Manifest.model_validate({**described, "tables": "fp32", "dense": "fp32", "stacks": {}, "files": {}})
