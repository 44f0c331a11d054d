"""Checkpoints that somebody changed with care: their checksums fit, their contents do not. Damage is in test_resume."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from ssr_rec.checkpointing.format import read_info
from ssr_rec.checkpointing.safe_metadata import read_metadata
from tests.checkpointing.test_checkpoint import SMALL, refusal, reseal
from tests.jobs import load_job, save_job
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "best"
    run_ranks(save_job, 2, SMALL, str(dataset), str(folder))
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def edit_metadata(folder, edit) -> None:
    """``edit(metadata, name of a table, its chunk, where that is)``."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.endswith("user.weight"))
    edit(metadata, index, metadata.state_dict_metadata[index.fqn].chunks[0], metadata.storage_data[index])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def halved_and_doubled(chunks) -> None:
    """As many numbers as before, but only those of the first half."""
    chunks[0].sizes = torch.Size([25, 8])
    chunks.append(chunks[0])


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_checkpoint_of_another_python_is_read(copy: Path, module: str) -> None:
    """Python 3.13 alone says that paths are of pathlib._local."""
    names = pickle.dumps(pickle.loads((copy / ".metadata").read_bytes()), protocol=2)
    written = re.sub(rb"cpathlib(\._local)?\nPosixPath", b"c%s\nPosixPath" % module.encode(), names)
    assert b"c%s\nPosixPath" % module.encode() in written
    (copy / ".metadata").write_bytes(written)
    assert read_metadata(copy, read_info(copy)["files"]).storage_data


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m, i, c, p: setattr(p, "relative_path", "../pipe"), "user.weight is in none of the checkpoint's files"),
        (lambda m, i, c, p: setattr(p, "relative_path", "/dev/zero"), "is in none of the checkpoint's files"),
        (lambda m, i, c, p: setattr(p, "length", 2**40), "user.weight is not within __"),
        (lambda m, i, c, p: setattr(p, "offset", -1), "user.weight is not within __"),
        (lambda m, i, c, p: setattr(p, "transform_descriptors", ["zstd"]), "user.weight is not within __"),
        (lambda m, i, c, p: m.storage_data.pop(i), "is in none of the checkpoint's files"),
        (lambda m, i, c, p: m.state_dict_metadata[i.fqn].chunks.clear(), "are not the whole of it"),
        (lambda m, i, c, p: m.state_dict_metadata[i.fqn].chunks.append(c), "are not the whole of it"),
        (lambda m, i, c, p: halved_and_doubled(m.state_dict_metadata[i.fqn].chunks), "are not the whole of it"),
        (lambda m, i, c, p: setattr(c, "sizes", torch.Size([50, 7])), "are not the whole of it"),
        (lambda m, i, c, p: setattr(c, "sizes", torch.Size([51, 8])), "are not the whole of it"),
        (lambda m, i, c, p: setattr(c, "offsets", torch.Size([1, 0])), "are not the whole of it"),
        (lambda m, i, c, p: m.state_dict_metadata.update(x=3), "'x' is no tensor"),
        (lambda m, i, c, p: setattr(m.state_dict_metadata[i.fqn], "properties", 3), "user.weight has no dtype"),
        (lambda m, i, c, p: setattr(m, "storage_meta", 3), "storage_meta is of another kind"),
        (lambda m, i, c, p: setattr(m, "storage_data", None), "has no attribute"),
    ],
)
def test_metadata_that_points_elsewhere_or_leaves_gaps(copy, edit, message):
    files = read_info(copy)["files"]
    assert read_metadata(copy, files)
    edit_metadata(copy, edit)
    with pytest.raises(ValueError, match=rf"{copy}/.metadata: damaged.*{message}"):
        read_metadata(copy, files)


def test_tensor_of_another_dtype(copy, dataset):
    def edit(metadata, index, chunk, place):
        metadata.state_dict_metadata[index.fqn].properties.dtype = torch.int32

    edit_metadata(copy, edit)
    reseal(copy)
    assert "(50, 8) torch.float32 here, (50, 8) torch.int32 there" in refusal(dataset, copy)


def test_metadata_that_changes_a_class(copy):
    """A pickle may set attributes of what it names: ``Path.exists = 1`` would outlive the load."""
    (copy / ".metadata").write_bytes(b"\x80\x02cpathlib\nPath\nN}X\x06\x00\x00\x00existsK\x01s\x86b.")
    with pytest.raises(ValueError, match=r"metadata changes <class .pathlib(._local)?.Path.>"):
        read_metadata(copy, read_info(copy)["files"])
    assert Path("/").exists()


def test_data_that_is_a_pickle(copy, dataset, tmp_path):
    for path in copy.glob("*.distcp"):
        size = path.stat().st_size
        path.write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/made'\ntR.".encode().ljust(size, b"\0"))
    reseal(copy)
    assert f"{copy}: damaged" in refusal(dataset, copy)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
def test_a_pipe_in_the_place_of_a_file(copy, dataset, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    message = refusal(dataset, copy)
    assert f"{copy / name}: " in message and "not a regular file" in message


def edit_info(folder, edit) -> None:
    info = json.loads((folder / "checkpoint.json").read_text())
    edit(info)
    (folder / "checkpoint.json").write_text(json.dumps(info))
    if isinstance(info["files"], dict) and all((folder / name).is_file() for name in info["files"]):
        reseal(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i["files"].pop(".metadata"), "the list of files lacks .metadata"),
        (lambda i: i["files"].update({"../copy/.metadata": [1, 2]}), "is not within the checkpoint"),
        (lambda i: i.update(kind="training"), "a training checkpoint needs position, config and fitted"),
        (lambda i: i.update(kind="recipe"), "kind: Input should be"),
        (lambda i: i.update(step="1"), "step: Input should be a valid integer"),
        (lambda i: i.pop("step"), "step: Field required"),
        (lambda i: i.update(format_version="1\n2"), r"format '1\\n2', this program reads format 1"),
    ],
)
def test_info_that_is_none(copy, edit, message):
    edit_info(copy, edit)
    with pytest.raises(ValueError) as raised:
        read_info(copy)
    assert message.replace("\\\\", "\\") in str(raised.value) and f"{copy}/checkpoint.json: " in str(raised.value)


def test_a_measure_that_is_not_defined_may_be_in_it(copy):
    edit_info(copy, lambda info: info.update(note=float("nan")))
    assert str(read_info(copy)["note"]) == "nan"


def test_an_intact_copy_loads(copy, dataset):
    assert run_ranks(load_job, 1, SMALL, str(dataset), str(copy))
