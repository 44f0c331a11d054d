"""A run's model on one process: what 1 and 2 ranks trained gives the figures that they reported."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ssr_rec.config.run import load_config
from ssr_rec.data.reader import Reader
from ssr_rec.metrics.exact import evaluate_predictions
from ssr_rec.serving.trained_model import Restored, best_checkpoint, load_plain_weights, restore_model
from tests.conftest import write_dataset
from tests.jobs import train_job
from tests.ranks import run_ranks

SMALL = [
    "--embeddings.dim=8",
    "--train.batch_size=64",
    "--train.eval_batch_size=100",
    "--embeddings.learning_rate=0.05",
]
SSR = ["--over_arch.num_views=2", "--over_arch.view_dim=8"]
DIMS = ["--embeddings.dims={user: 12, tags: 4}"]
JOBS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, [*SSR, *DIMS]),
    "2 ranks, tables cut": (2, [*SSR, *DIMS, "--sharding.types=[column_wise]", "--data.labels=[like, click]"]),
    "2 ranks, batch norm": (2, ["--over_arch.name=deepfm", "--over_arch.hidden=[8]", "--over_arch.input_norm=per_dim"]),
    "bf16": (1, ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--train.bf16=true", "--embeddings.optimizer=adam"]),
}


def train_run(dataset: Path, runs: Path, ranks: int, options: list[str]) -> tuple[Path, dict[str, Any]]:
    report = run_ranks(train_job, ranks, [*SMALL, f"--data.path={dataset}", f"--runs={runs}", "--name=run", *options])
    return runs / "run", report[0]


def scored(restored: Restored, split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a split in the reader's order."""
    outputs = []
    with torch.no_grad():
        for batch in Reader(restored.data, restored.schema, split, batch_size=64).epoch(0):
            outputs.append((restored.model(batch.sparse), batch.labels))
    logits, labels = (torch.cat(part) for part in zip(*outputs, strict=True))
    return logits, labels


@pytest.mark.parametrize("job", [pytest.param(job, marks=[] if "cut" in job else pytest.mark.slow) for job in JOBS])
def test_the_restored_model_gives_the_reported_figures(dataset, tmp_path, job):
    run, report = train_run(dataset, tmp_path, *JOBS[job])
    state = torch.get_rng_state()
    restored = restore_model(run)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in restored.model.modules())
    logits, labels = scored(restored)
    found = evaluate_predictions(logits.numpy(), labels.numpy(), None, restored.schema.labels)
    for task, measures in found.items():
        for name, value in measures.items():
            assert value == pytest.approx(report["test"][task][name], abs=1e-6), (task, name)
    assert list(found) == (["like", "click"] if "cut" in job else ["click", "like"])


def test_what_cannot_be_restored_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        restore_model(dataset)
    run, report = train_run(dataset, tmp_path, *JOBS["1 rank"])
    other = write_dataset(tmp_path / "other", {"train": 90, "validation": 30, "test": 30}, 30, seed=9)
    with pytest.raises(ValueError, match=r"tiny-9, the run .* was trained on tiny-0"):
        restore_model(run, other)
    moved = dataset.rename(dataset.with_name("moved"))
    try:
        with pytest.raises(ValueError, match="no such file"):
            restore_model(run)
        restored = restore_model(run, moved)
    finally:
        moved.rename(dataset)
    assert restored.checkpoint.name == f"best-{report['best_step']:09d}"
    config = load_config(run / "config.yaml", ["--over_arch.view_dim=4"])
    (run / "config.yaml").write_text(config.model_dump_json())
    with pytest.raises(ValueError, match="does not fit this model"):
        restore_model(run)


def test_the_best_weights_are_those_that_the_report_names(tmp_path):
    run = tmp_path / "run"
    for step in (7, 30):
        (run / "checkpoints" / f"best-{step:09d}").mkdir(parents=True)
    assert best_checkpoint(run).name == "best-000000030"
    pd.Series({"name": "x", "over_arch": {}, "test": {}, "dataset": {}, "best_step": 7}).to_json(run / "report.json")
    assert best_checkpoint(run).name == "best-000000007"
    (run / "checkpoints" / "best-000000007").rmdir()
    with pytest.raises(ValueError, match="no best weights"):
        best_checkpoint(run)


def test_a_damaged_checkpoint_is_refused(dataset, tmp_path):
    run, _ = train_run(dataset, tmp_path, *JOBS["1 rank"])
    restored = restore_model(run)
    data = next(restored.checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-9] + b"\0" * 9)
    with pytest.raises(ValueError, match="damaged"):
        load_plain_weights(restored.model, restored.checkpoint)
