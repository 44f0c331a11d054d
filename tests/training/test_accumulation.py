"""Accumulated dense gradients: k batches are to the over-arch what one batch of all their rows is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from ssr_rec.checkpointing.format import read_checkpoint, stored_tensors
from ssr_rec.runs.folder import read_metrics
from ssr_rec.training.accumulation import Accumulation
from ssr_rec.training.setup import start_process_group
from tests.checkpointing.test_resume import losses, options, rows
from tests.jobs import refused_job, stopped_job, train_job
from tests.ranks import run_ranks
from tests.scale_jobs import reductions_job

FROZEN_TABLES = ["--embeddings.optimizer=sgd", "--embeddings.learning_rate=0.0", "--train.eval_every=null"]


def dense_state(runs: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights of the over-arch and heads, and Adam's moments, of a checkpoint."""
    folder = runs / "run" / "checkpoints" / f"step-{step:09d}"
    stored = stored_tensors(folder)
    names = [n for n in stored if n.startswith(("model/", "optimizer/")) and ".dense." in n and not n.endswith("step")]
    state = {n: torch.empty(stored[n][0], dtype=stored[n][1]) for n in names}
    start_process_group("cpu")
    read_checkpoint(state, folder)
    return state


class Model:
    """As much of DistributedModelParallel as Accumulation looks at on one process."""

    def __init__(self, module: nn.Module) -> None:
        self._dmp_wrapped_module = module


@pytest.mark.parametrize("skipped", [None, 0, 2])
def test_a_group_of_uneven_batches_is_one_batch(skipped):
    """Against plain autograd on the concatenated rows; a skipped batch is as if it had no rows."""
    torch.manual_seed(0)
    sizes = [5, 3, 7, 4, 4]
    x, y = torch.randn(sum(sizes), 6), torch.randn(sum(sizes))
    table, linear = nn.Parameter(torch.zeros(2)), nn.Linear(6, 1)
    plain = nn.Linear(6, 1)
    plain.load_state_dict(linear.state_dict())

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    fused = KeyedOptimizerWrapper({"t": table}, sgd)
    dense = KeyedOptimizerWrapper(dict(linear.named_parameters()), sgd)
    accumulation = Accumulation(Model(linear), CombinedOptimizer([("fused", fused), ("dense", dense)]))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    for k, (bx, by) in enumerate(batches):
        with accumulation.batch(len(by), ends_group=k in (2, 4)):
            accumulation.zero_grad()
            table.grad = torch.ones(2)
            loss = ((linear(bx).flatten() - by) ** 2).mean()
            (loss * 0 if k == skipped else loss).backward()
            if k != skipped:
                accumulation.step()
    reference = torch.optim.SGD(plain.parameters(), lr=0.5)
    for group in ([0, 1, 2], [3, 4]):
        kept = [batches[k] for k in group if k != skipped]
        reference.zero_grad()
        bx, by = torch.cat([b[0] for b in kept]), torch.cat([b[1] for b in kept])
        ((plain(bx).flatten() - by) ** 2).mean().backward()
        reference.step()
    for mine, theirs in zip(linear.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), skipped
    assert table.tolist() == [-0.5 * (5 if skipped is None else 4)] * 2, "the tables are updated by every batch"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_four_batches_of_16_train_the_dense_part_as_one_of_64(dataset, tmp_path, world_size):
    """Over one epoch, 1,003 rows: the last group has three batches, of 16, 16 and 11 rows."""
    more = [*FROZEN_TABLES, "--train.epochs=1", "--optimizer.clip_norm=0.5", "--optimizer.weight_decay=0.01"]
    run_ranks(train_job, world_size, options(dataset, tmp_path / "large", *more))
    small = [*more, "--train.batch_size=16", "--train.accumulate=4"]
    run_ranks(train_job, world_size, options(dataset, tmp_path / "small", *small))
    mine, theirs = dense_state(tmp_path / "small", 63), dense_state(tmp_path / "large", 16)
    assert mine.keys() == theirs.keys() and any("exp_avg" in name for name in mine)
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=2e-6), name


@pytest.mark.slow
def test_the_tables_do_not_notice(dataset, tmp_path):
    """With a dense part that does not move, accumulating or not is the same to the last bit."""
    more = ["--optimizer.learning_rate=0.0", "--train.epochs=1", "--train.log_every=3", "--train.eval_every=null"]
    for k in (1, 3):
        run_ranks(train_job, 2, options(dataset, tmp_path / str(k), *more, f"--train.accumulate={k}"))
    assert np.array_equal(losses(tmp_path / "1"), losses(tmp_path / "3"))


@pytest.mark.slow
def test_world_size_does_not_change_the_losses(dataset, tmp_path):
    """Groups run over evaluations and epochs: 48 steps, 16 an epoch, the last of each smaller."""
    for world_size in (1, 2):
        more = ["--train.accumulate=5", "--embeddings.optimizer=sgd", "--embeddings.learning_rate=3.0"]
        run_ranks(train_job, world_size, options(dataset, tmp_path / str(world_size), *more))
    assert np.abs(losses(tmp_path / "1") - losses(tmp_path / "2")).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--embeddings.optimizer=rowwise_adagrad"],
        ["--embeddings.optimizer=adam", "--embeddings.learning_rate=0.001"],
    ],
    ids=["fused", "replicated"],
)
def test_resuming_in_the_middle_of_a_group_continues_bit_for_bit(dataset, tmp_path, more):
    """Asked to stop at step 8, whose window ends in an evaluation at 10: the checkpoint waits for the group, 12."""
    more = ["--train.accumulate=4", "--train.log_every=4", "--optimizer.warmup_steps=30", *more]
    whole = run_ranks(train_job, 2, options(dataset, tmp_path / "whole", *more))[0]
    parts = options(dataset, tmp_path / "parts", *more)
    assert run_ranks(stopped_job, 2, parts, 9) == ["preempted"] * 2
    assert [path.name for path in (tmp_path / "parts/run/checkpoints").glob("step-*")] == ["step-000000012"]
    resumed = run_ranks(train_job, 2, parts)[0]
    for split in ("train", "validation"):
        mine, theirs = (rows(tmp_path / name, split) for name in ("parts", "whole"))
        assert [(r["step"], r["loss"], r["tasks"]) for r in mine] == [
            (r["step"], r["loss"], r["tasks"]) for r in theirs
        ]
    assert resumed["test"] == whole["test"] and resumed["steps"] == 48


@pytest.mark.slow
def test_checkpoints_and_progress_wait_for_the_group(dataset, tmp_path):
    more = ["--train.accumulate=4", "--train.log_every=3", "--checkpoint.every_steps=5", "--checkpoint.keep=99"]
    run_ranks(train_job, 1, options(dataset, tmp_path, *more, "--train.max_steps=30", "--train.eval_every=null"))
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved == [8, 12, 16, 20, 28, 30], "multiples of 5, each at the end of its group; and the end"
    logged = [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["split"] == "train"]
    assert logged == [4, 8, 12, 16, 20, 24, 28, 30]
    longer = options(dataset, tmp_path, *more, "--train.max_steps=40", "--train.eval_every=null")
    longer += ["--name=longer", f"--resume={tmp_path / 'run'}"]
    said = run_ranks(refused_job, 1, longer)[0]
    assert said.startswith("resume: the run ended at step 30, within a group of train.accumulate=4"), said


@pytest.mark.slow
def test_ranks_reduce_once_for_a_group(dataset, tmp_path):
    more = ["--train.epochs=1", "--train.log_every=1000", "--train.eval_every=null"]
    counts = {}
    for k in (1, 4, 16):
        counts[k], steps = run_ranks(
            reductions_job, 2, options(dataset, tmp_path / str(k), *more, f"--train.accumulate={k}")
        )[0]
        assert steps == 16
    # One more is the window's. Without accumulation DDP's graph is static, which takes one at the first step.
    assert counts == {1: 18, 4: 5, 16: 2}
