"""On a public log the ten lines of a notebook give what the commands give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ssr_rec import CTRClassifier
from ssr_rec.common.yaml_file import read_yaml
from ssr_rec.runs.report import read_report
from tests.prepare_log import ROOT, SHARED

RATINGS = SHARED / "ml1m_half" / "ratings.parquet"
SPEC = ROOT / "configs" / "data" / "ml1m_half.yaml"


@pytest.mark.slow
@pytest.mark.skipif(not RATINGS.is_file(), reason="no shared data beside the checkout")
def test_movielens_by_ten_lines_and_by_the_commands(tmp_path: Path) -> None:
    def command(*words: str | Path) -> None:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    command("tools/prepare_data.py", "table", "--spec", SPEC, "--input", RATINGS, "--output", tmp_path / "data")
    options = ["--over_arch={name: mlp, hidden: [64]}", "--train.batch_size=4096", "--train.epochs=1", "--device=cpu"]
    tables = ["--embeddings.optimizer=adam", "--embeddings.learning_rate=1e-2"]
    where = [f"--data.path={tmp_path / 'data'}", f"--runs={tmp_path}", "--name=run"]
    command("ssr_rec/train.py", *options, *tables, *where)

    model = CTRClassifier(
        over_arch={"name": "mlp", "hidden": [64]},
        epochs=1,
        batch_size=4096,
        config={"embeddings": {"optimizer": "adam", "learning_rate": 1e-2}},
    )
    spec = read_yaml(SPEC, "a spec")
    model.fit(pd.read_parquet(RATINGS), **{key: spec[key] for key in spec if key != "name"})

    here, there = model.report_.test["label"]["auc"], read_report(tmp_path / "run").test["label"]["auc"]
    print(f"CTRClassifier {here!r}, commands {there!r}")
    assert here is not None and there is not None and abs(here - there) < 1e-6 and here > 0.78
