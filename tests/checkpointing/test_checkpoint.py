"""Weights survive a save and a load on any number of ranks; damaged or hostile folders are refused."""

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest

from tests.jobs import load_job, save_job
from tests.ranks import run_ranks

SMALL = ["--over_arch.num_views=2", "--over_arch.view_dim=8", "--embeddings.dim=8"]


@pytest.fixture(scope="module")
def saved(dataset, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("checkpoint") / "best"
    return folder, run_ranks(save_job, 2, SMALL, str(dataset), str(folder))[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_load_on_any_number_of_ranks(saved, dataset, world_size):
    folder, weights = saved
    assert run_ranks(load_job, world_size, SMALL, str(dataset), str(folder))[0] == weights


def refusal(dataset, folder, options=SMALL) -> str:
    with pytest.raises(AssertionError) as failure:
        run_ranks(load_job, 1, options, str(dataset), str(folder))
    assert "UserError: " in str(failure.value)
    return str(failure.value)


def test_incomplete_checkpoint_is_refused(saved, dataset, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    (copy / "checkpoint.json").unlink()
    assert "no complete checkpoint" in refusal(dataset, copy)


def test_checkpoint_of_another_model_is_refused(saved, dataset):
    assert "does not fit this model" in refusal(dataset, saved[0], [*SMALL, "--embeddings.dim=12"])


def reseal(folder: Path) -> None:
    """Make checkpoint.json agree with the files again, as an attacker would."""
    path = folder / "checkpoint.json"
    info = json.loads(path.read_text())
    del info["crc32"]
    info["files"] = {name: [len(b := (folder / name).read_bytes()), zlib.crc32(b)] for name in info["files"]}
    info["crc32"] = zlib.crc32(json.dumps(info, sort_keys=True).encode())
    path.write_text(json.dumps(info))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def test_loading_executes_nothing(saved, dataset, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    (copy / ".metadata").write_bytes(pickle.dumps(Hostile()))
    reseal(copy)
    assert "checkpoint metadata names posix.mkdir" in refusal(dataset, copy)
    assert not Path("hostile-code-ran").exists()


def test_saving_again_replaces_the_old_one(dataset, tmp_path):
    folder = tmp_path / "best"
    first = run_ranks(save_job, 1, SMALL, str(dataset), str(folder))[0]
    second = run_ranks(save_job, 2, [*SMALL, "--seed=5"], str(dataset), str(folder))[0]
    assert first != second == run_ranks(load_job, 1, SMALL, str(dataset), str(folder))[0]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
