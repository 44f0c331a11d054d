"""A warm start on a dataset prepared anew: rows follow their values, or it is refused."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ssr_rec.checkpointing.train_state import optimizer_tensors
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.checkpointing.warm_start import feature_of, warm_start
from ssr_rec.config.run import load_config
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.schema import Schema
from ssr_rec.training.optimizer import build_optimizer
from tests.checkpointing.test_resume import options
from tests.jobs import built_model, refused_job, train_job, whole_tables
from tests.ranks import run_ranks

SPEC = {"name": "m", "labels": ["click", "like"], "categorical": ["item", "kind", "code"], "numeric": ["price"]}
SPEC |= {"lists": {"tags": {"separator": "|", "max_length": 3}}, "min_count": 2, "num_buckets": 8}
SPEC |= {"hash_buckets": {"code": 11}}
SMALL = ["--train.max_steps=6", "--train.eval_every=3"]


def write_log(path: Path, seed: int, reverse: bool) -> Path:
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, 21)
    items = rng.choice(20, 900, p=(chance[::-1] if reverse else chance) / chance.sum())
    lines = ["click,like,item,kind,code,price,tags"]
    for number, item in enumerate(items):
        tags = "|".join(f"t{tag}" for tag in rng.choice(items, 2))
        top = 50 if reverse else 400
        new = "new" if reverse and number % 2 else "k"
        lines.append(f"{number % 2},{number % 3 // 2},i{item},{new},c{item},{rng.integers(0, top)},{tags}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    for name, reverse in (("a", False), ("b", True)):
        log = write_log(folder / f"{name}.csv", 1 + reverse, reverse)
        prepare([str(log)], folder / name, make_spec(SPEC, "test"))
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("trained")
    run_ranks(train_job, 2, options(datasets[0], runs, *SMALL))
    return runs / "run"


def warm_job(overrides: list[str], dataset: str, source: str | None) -> tuple[dict, dict[str, np.ndarray]]:
    """The report, and the whole tables and their optimizer's state; rank 0's are complete."""
    model = built_model(overrides, dataset)
    config = load_config(None, overrides)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    report = {}
    if source:
        report = warm_start(model, Path(source), Here(Path(dataset), Schema.read(dataset)), optimizer)
    found = {key.split(".")[-2]: t.numpy() for key, t in whole_tables(model).items() if "embedding_bags" in key}
    parts = [
        (feature_of(name), value.size()[0], shard.metadata.shard_offsets[0], shard.tensor)
        for name, value in optimizer_tensors(optimizer).items()
        if _is_state(name, value)
        for shard in value.local_shards()
    ]
    of_ranks: list = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, parts)
    for feature, rows, start, part in (part for parts in of_ranks for part in parts):
        found.setdefault(f"{feature}/state", np.zeros((rows, *part.shape[1:]), np.float32))[
            start : start + len(part)
        ] = part.numpy()
    return report, found


def _is_state(name: str, value: torch.Tensor | ShardedTensor) -> bool:
    return ".embedding_bags." in name and isinstance(value, ShardedTensor) and value.size().numel() > 1


def values(folder: Path, feature: str) -> dict[str, int]:
    """Value -> row, in plain Python; the rows of missing and of rare values by names that no value has."""
    encoding = {f.name: f for f in Schema.read(folder).features}[feature].encoding
    table = pq.read_table(folder / encoding.file).to_pylist()
    return {"<missing>": 0, "<oov>": 1, **{row["value"]: row["id"] for row in table}}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_and_their_optimizer_state_follow_the_values(datasets, trained, tmp_path, world_size):
    old_data, new_data = datasets
    arguments = options(new_data, tmp_path)
    report, new = run_ranks(warm_job, world_size, arguments, str(new_data), str(trained))[0]
    _, old = run_ranks(warm_job, 1, options(old_data, tmp_path), str(old_data), str(trained))[0]
    _, fresh = run_ranks(warm_job, 1, arguments, str(new_data), None)[0]
    assert sorted(name.split(".")[-2] for name in report["mapped"]) == ["item", "kind", "price", "tags"]
    assert report["optimizer"]["mapped"] == 4 and not report["optimizer"]["fresh"]
    for feature in ("item", "kind", "tags"):
        before, now = values(old_data, feature), values(new_data, feature)
        assert before != now
        for value, row in now.items():
            expected = old[feature][before[value]] if value in before else fresh[feature][row]
            assert np.array_equal(new[feature][row], expected), (feature, value)
            state = old[f"{feature}/state"][before[value]] if value in before else 0
            assert np.array_equal(new[f"{feature}/state"][row], state), (feature, value)
    assert "new" in values(new_data, "kind")
    assert np.array_equal(new["code"], old["code"]) and np.array_equal(new["code/state"], old["code/state"])
    bounds = {folder: {f.name: f.encoding for f in Schema.read(folder).features}["price"] for folder in datasets}
    there, here = bounds[old_data], bounds[new_data]
    for bucket in range(here.num_buckets):
        middle = here.low + (bucket + 0.5) * (here.high - here.low) / here.num_buckets
        position = math.floor((middle - there.low) / (there.high - there.low) * there.num_buckets)
        row = there.first_id + min(max(position, 0), there.num_buckets - 1)
        assert np.array_equal(new["price"][here.first_id + bucket], old["price"][row])


@pytest.mark.slow
def test_what_cannot_be_told_is_refused(datasets, trained, tmp_path):
    old_data, new_data = datasets

    def refused(data: Path, source: Path, *more: str) -> str:
        return run_ranks(refused_job, 1, options(data, tmp_path / "runs", f"--warm_start={source}", *more))[0]

    assert '--data.labels=["click", "like"]' in refused(old_data, trained, "--data.labels=[like, click]")
    order = "--data.features=[kind, item, code, price, tags]"
    assert '--data.features=["item", "kind", "code", "price", "tags"]' in refused(old_data, trained, order)
    alone = tmp_path / "alone"
    shutil.copytree(next((trained / "checkpoints").glob("best-*")), alone)
    assert refused(old_data, alone, "--train.max_steps=1", "--name=alone") == "not refused"
    old_data.rename(tmp_path / "away")
    try:
        assert "the vocabularies that would tell are gone" in refused(new_data, trained)
        new_data.rename(old_data)  # the new log was prepared in the old one's place
        assert "holds dataset" in refused(old_data, trained)
        old_data.rename(new_data)
    finally:
        (tmp_path / "away").rename(old_data)
