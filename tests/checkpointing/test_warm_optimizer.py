"""An optimizer's state out of another run's checkpoint: tables that have grown keep that of their old rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ssr_rec.checkpointing.train_state import optimizer_tensors
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.checkpointing.warm_start import warm_start
from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.training.optimizer import build_optimizer
from tests.checkpointing.test_resume import options
from tests.checkpointing.test_warm_start import SMALL, grown
from tests.jobs import built_model, train_job, whole_tables
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def state_job(overrides: list[str], dataset: str, source: str) -> tuple[dict, dict[str, tuple], bool]:
    """The report, what this rank holds of the optimizer's state, and whether no weight and no rate was moved."""
    model = built_model(overrides, dataset)
    here, checkpoint = Here(Path(dataset), Schema.read(dataset)), next(Path(source).glob("checkpoints/step-*"))
    warm_start(model, checkpoint, here)
    config = load_config(None, overrides)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    before = whole_tables(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    report = warm_start(model, Path(source), here, optimizer)
    same = all(torch.equal(value, before[name]) for name, value in whole_tables(model).items())
    return (
        report["optimizer"],
        {name: local(t) for name, t in optimizer_tensors(optimizer).items()},
        same and (rates == [group["lr"] for group in optimizer.param_groups]),
    )


def local(value: torch.Tensor | ShardedTensor) -> tuple[np.ndarray, bool]:
    """This rank's part of a tensor, zero elsewhere, and whether others have the rest."""
    if not isinstance(value, ShardedTensor):
        return value.numpy().copy(), False
    found = torch.zeros(value.size())
    for shard in value.local_shards():
        places = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        found[tuple(slice(start, start + size) for start, size in places)] = shard.tensor
    return found.numpy(), True


def whole(ranks: list[tuple[dict, dict[str, tuple], bool]]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for _, state, _ in ranks:
        for name, (part, is_sharded) in state.items():
            found[name] = found[name] + part if is_sharded and name in found else part
    return found


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adam", "adagrad", "lazy_adam"])
def test_old_rows_keep_their_state_and_new_ones_have_none(dataset, tmp_path, kind):
    more = [f"--embeddings.optimizer={kind}", *(["--embeddings.weight_decay=0.1"] if "adam" in kind else [])]
    run_ranks(train_job, 2, options(dataset, tmp_path, *SMALL, *more))
    source = str(tmp_path / "run")
    larger = grown(dataset, tmp_path / "larger", {"user": 7, "tags": 100})
    ranks = run_ranks(state_job, 2, options(larger, tmp_path, *more), str(larger), source)
    old = whole(run_ranks(state_job, 1, options(dataset, tmp_path, *more), str(dataset), source))
    (report, _, unmoved), state = ranks[0], whole(ranks)
    assert unmoved and report["steps"] == 6 and report["fresh"] == 0
    assert set(state) == set(old) and report["loaded"] + report["grown"] == len(state)
    tables = [name for name in state if ".embedding_bags.user." in name or ".embedding_bags.tags." in name]
    grown_ones = [name for name in tables if state[name].shape != old[name].shape]
    assert len(grown_ones) == report["grown"] >= 2
    for name in state:
        rows = len(old[name]) if old[name].ndim else None
        assert np.array_equal(state[name][:rows] if rows is not None else state[name], old[name]), name
        if name in grown_ones:
            assert np.abs(old[name]).sum() > 0
            assert not state[name][rows:].any()
    assert any(np.abs(value).sum() > 0 for name, value in old.items() if ".dense." in name)


@pytest.mark.parametrize(("old", "new"), [("adagrad", "lazy_adam"), ("lazy_adam", "adagrad")])
def test_the_state_of_another_optimizer_is_not_taken_for_its_own(dataset, tmp_path, old, new):
    """Element-wise Adagrad's sums and Adam's first moments have one name and one size."""
    run_ranks(train_job, 1, options(dataset, tmp_path, *SMALL, f"--embeddings.optimizer={old}"))
    more = options(dataset, tmp_path, f"--embeddings.optimizer={new}")
    report, state, _ = run_ranks(state_job, 1, more, str(dataset), str(tmp_path / "run"))[0]
    tables = [name for name in state if name.startswith("optimizer/fused.")]
    assert tables and report["fresh"] == len(tables) and report["loaded"] == len(state) - len(tables)
    assert not any(state[name][0].any() for name in tables)
