"""A loss of nan or an explosion on one rank: the run ends and says where, or leaves the step out on all ranks."""

from pathlib import Path

import pytest
import torch

from ssr_rec.checkpointing.format import read_checkpoint, stored_tensors
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.training.setup import start_process_group
from tests.checkpointing.test_resume import losses, options, rows
from tests.jobs import bad_loss_job, train_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.faults

BAD_STEP = 21
SAVES = ["--checkpoint.every_steps=1", "--checkpoint.keep=100"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 50.0])
@pytest.mark.parametrize("log_every", [1, 7])
def test_a_bad_loss_ends_the_run_and_names_step_and_batch(dataset, tmp_path, value, log_every):
    more = ["--checkpoint.every_steps=6", f"--train.log_every={log_every}"]
    said = run_ranks(bad_loss_job, 2, options(dataset, tmp_path, *more), BAD_STEP, value)
    reader = Reader(Path(dataset), Schema.read(dataset), "train", 64, seed=0)
    for message in said:
        assert f"at step {BAD_STEP}, batch 4 of epoch 1 ({reader.describe(1, 4)})" in message, message
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-000000012", "step-000000018"], "nothing is saved after a bad step"
    # The run goes on from the last good checkpoint as if nothing had happened.
    report = run_ranks(train_job, 2, options(dataset, tmp_path, *more))[0]
    assert report["test"] == run_ranks(train_job, 2, options(dataset, tmp_path / "whole", *more))[0]["test"]


def test_reader_says_where_a_batch_comes_from(dataset):
    """Unshuffled and in one lane, batch k of 64 rows is row group k."""
    reader = Reader(Path(dataset), Schema.read(dataset), "train", 64, num_lanes=1)
    assert reader.describe(0, 3) == f"{dataset}/train/00000.parquet row group 3"
    reader = Reader(Path(dataset), Schema.read(dataset), "train", 640, num_lanes=1)
    assert reader.describe(0, 0).endswith("row group 3 and 6 more")


def state_at(runs: Path, step: int) -> dict[str, torch.Tensor]:
    folder = runs / "run" / "checkpoints" / f"step-{step:09d}"
    stored = stored_tensors(folder)
    state = {n: torch.empty(s, dtype=d) for n, (s, d) in stored.items() if n.startswith(("model/", "optimizer/"))}
    start_process_group("cpu")
    read_checkpoint(state, folder)
    return state


@pytest.mark.parametrize(
    ("optimizer", "value", "max_loss"), [("rowwise_adagrad", float("nan"), "10"), ("adam", float("inf"), "null")]
)
def test_a_skipped_step_changes_nothing(dataset, tmp_path, optimizer, value, max_loss):
    more = [f"--embeddings.optimizer={optimizer}", "--train.skip_bad_steps=1", f"--train.max_loss={max_loss}", *SAVES]
    report = run_ranks(bad_loss_job, 2, options(dataset, tmp_path, *more), BAD_STEP, value)[1]
    assert report["skipped_steps"] == 1 and report["steps"] == 48
    before, skipped, after = (state_at(tmp_path, BAD_STEP + offset) for offset in (-1, 0, 1))
    assert len(before) > 20
    for name, value in before.items():
        assert torch.equal(value, skipped[name]), name
    assert not all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(torch.isfinite(value).all() for value in after.values())
    bad = rows(tmp_path)[BAD_STEP - 1]
    assert bad["step"] == BAD_STEP and bad["loss"] is None


def test_skipping_costs_good_steps_nothing(dataset, tmp_path):
    run_ranks(train_job, 2, options(dataset, tmp_path / "a"))
    run_ranks(train_job, 2, options(dataset, tmp_path / "b", "--train.skip_bad_steps=5"))
    assert (losses(tmp_path / "a") == losses(tmp_path / "b")).all()


def test_more_bad_steps_than_allowed_end_the_run(dataset, tmp_path):
    more = ["--train.skip_bad_steps=2", "--train.log_every=5"]
    said = run_ranks(bad_loss_job, 2, options(dataset, tmp_path, *more), BAD_STEP, float("nan"), 3)
    assert all("train.skip_bad_steps (now 2)" in message for message in said)


def test_max_loss_can_be_off(dataset, tmp_path):
    more = ["--train.max_loss=null"]
    report = run_ranks(bad_loss_job, 2, options(dataset, tmp_path, *more), BAD_STEP, 50.0)[0]
    assert report["steps"] == 48 and losses(tmp_path)[BAD_STEP - 1] > 10
