"""Artifacts of prepared logs: they know how common missing and unknown values were in training, and warn of others."""

from pathlib import Path

import pytest

from ssr_rec.serving.artifact import read_manifest
from ssr_rec.serving.export import export_run
from ssr_rec.serving.scorer import load
from tests.made_run import make_run
from tests.prepare_log import make_rows, run, spec_with, write_csv
from tests.serving.test_value_shares import looped

pytestmark = pytest.mark.slow
MLP = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=8"]
ROWS = make_rows(2000)


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
