"""Training checkpoints, mutated file by file, with and without their checksums made to fit again.

The promise: refused by one line that names the checkpoint, or restored as it was saved. Where checksums were made to
fit, which only somebody does on purpose, other numbers may be taken, but all of them come from the checkpoint: the run
is filled with a mark before each case, and none may be left. Nothing is executed, and no file outside is opened.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from ssr_rec.checkpointing.resume import find_start
from ssr_rec.checkpointing.train_state import (
    initialise_optimizer,
    model_tensors,
    optimizer_tensors,
    rank_tensors,
    restore,
)
from ssr_rec.checkpointing.warm_start import load_weights
from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.metrics.running import RunningAUC
from ssr_rec.model.build import build_model
from ssr_rec.train import train
from ssr_rec.training.datasets import open_reader
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.setup import start_process_group
from tests.conftest import write_dataset
from tests.fuzz.harness import Target, refusal
from tests.fuzz.mutators import NASTY_VALUES, Rng, damage_bytes, damage_tree, pick, replace_by_no_file, write

OPTIONS = [
    "--name=x",
    "--train.batch_size=32",
    "--train.max_steps=4",
    "--checkpoint.every_steps=2",
    "--embeddings.dim=8",
]
SMALL = ["--over_arch.num_views=2", "--over_arch.view_dim=8", "--device=cpu", "--checkpoint.asynchronous=false"]
MARK = 123.0
SENTINEL = "executed"
INFO = "checkpoint.json"


@dataclass
class State:
    checkpoints: Path
    config: dict[str, Any]
    parts: tuple[Any, ...]
    """Model, optimizer, running AUC, reader of a run that checkpoints are restored into."""
    expected: dict[str, Tensor]
    fitted: dict[str, Any]


def prepare(folder: Path) -> State:
    data = write_dataset(folder / "data", {"train": 200, "validation": 40, "test": 40}, rows_in_group=64)
    config = load_config(None, [*OPTIONS, *SMALL, f"--data.path={data}", f"--runs={folder / 'runs'}"])
    train(config)
    start_process_group("cpu")
    schema = Schema.read(data)
    model = build_model(config, schema, torch.device("cpu"), 1, 1)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    parts = (model, optimizer, RunningAUC(schema.labels, window=64), open_reader(config, data, schema, "train", 0, 1))
    initialise_optimizer(optimizer)
    state = State(folder / "runs" / "x" / "checkpoints", config.model_dump(mode="json"), parts, {}, {})
    mark(state)
    state.fitted = load(state, state.checkpoints / "step-000000004")
    state.expected = {name: value.clone() for name, value in tensors(state).items()}
    return state


def load(state: State, checkpoint: Path) -> dict[str, Any]:
    """As a run does that is told to resume from it."""
    config = {**state.config, "resume": str(checkpoint)}
    start = find_start(config, checkpoint.parent, False)
    assert start.checkpoint is not None
    return asdict(restore(start.checkpoint, start.info, *state.parts, seed=0))


def tensors(state: State) -> dict[str, Tensor]:
    model, optimizer, running, _ = state.parts
    found = {**model_tensors(model), **optimizer_tensors(optimizer), **rank_tensors(model, running)}
    return {
        name: value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
        for name, value in found.items()
    }


def mark(state: State) -> None:
    model, optimizer, _, _ = state.parts
    for values in (model_tensors(model), optimizer_tensors(optimizer)):
        for value in values.values():
            with torch.no_grad():
                (value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value).fill_(MARK)
    torch.manual_seed(123)


def run(state: State, folder: Path, rng: Rng) -> str:
    checkpoint = shutil.copytree(state.checkpoints / "step-000000004", folder / "step-000000004")
    kind = pick(rng, KINDS)
    resealed = KINDS[kind](rng, checkpoint, state)
    mark(state)
    real = (Path.exists, Path.open, Path.__truediv__, os.path.join)
    weights_only = rng.random() < 0.25
    try:
        if weights_only:
            load_weights(state.parts[0], checkpoint)
            fitted = state.fitted
        else:
            fitted = load(state, checkpoint)
    except Exception as error:
        return refusal(error, str(checkpoint))
    finally:
        assert (Path.exists, Path.open, Path.__truediv__, os.path.join) == real, "the process was changed"
        assert not (folder / SENTINEL).exists(), "code from the file was executed"
    found, same = tensors(state), fitted == state.fitted
    for name, value in found.items():
        if weights_only and not name.startswith("model/"):
            continue
        assert not (value == MARK).any() or name.startswith("rank"), f"{name}: not all of it was read"
        same &= torch.equal(value, state.expected[name])
    assert same or resealed, f"{kind}: silently another state"
    return "same" if same else "taken, other numbers"


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.is_file())


def flip(rng: Rng, checkpoint: Path, state: State) -> bool:
    path = pick(rng, _files(checkpoint))
    path.write_bytes(damage_bytes(rng, path.read_bytes()))
    return False


def remove(rng: Rng, checkpoint: Path, state: State) -> bool:
    replace_by_no_file(rng, pick(rng, _files(checkpoint)))
    return False


def swap(rng: Rng, checkpoint: Path, state: State) -> bool:
    """A file of another checkpoint, or another file of this one."""
    path = pick(rng, _files(checkpoint))
    others = sorted(p for p in state.checkpoints.glob("*/*")) + sorted(state.checkpoints.glob("*/.metadata"))
    path.write_bytes(pick(rng, others).read_bytes())
    return False


def flip_and_reseal(rng: Rng, checkpoint: Path, state: State) -> bool:
    path = pick(rng, [path for path in _files(checkpoint) if path.name != INFO])
    path.write_bytes(damage_bytes(rng, path.read_bytes()))
    reseal(checkpoint)
    return True


def edit_info(rng: Rng, checkpoint: Path, state: State) -> bool:
    """Another value, key or file list in checkpoint.json, with a fitting checksum where it is JSON at all."""
    values = json.loads((checkpoint / INFO).read_text())
    del values["crc32"]
    if rng.random() < 0.3:
        values["files"] = pick(rng, (*NASTY_VALUES, {}, {".metadata": 3}, {"../x": [1, 2]}, {"__0_0.distcp": ["a", 1]}))
    else:
        values = damage_tree(rng, values)
    text = write(values)
    try:
        crc = zlib.crc32(json.dumps(json.loads(text), sort_keys=True).encode())
        text = json.dumps({**json.loads(text), "crc32": crc})
    except (ValueError, TypeError, RecursionError):
        text = text[:-1] + ', "crc32": 1}'
    (checkpoint / INFO).write_text(text)
    return True


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile_pickle(rng: Rng, checkpoint: Path, state: State) -> bool:
    """A pickle that calls, patches, nests or swells, in the place of the metadata or of a tensor."""
    made = checkpoint.parent / SENTINEL
    system = f"cos\nsystem\n(S'touch {made}'\ntR.".encode()
    patch = b"\x80\x02cpathlib\nPath\nN}X\x06\x00\x00\x00existsK\x01s\x86b."
    payload = pick(
        rng,
        (
            pickle.dumps(Hostile(made), protocol=int(rng.integers(6))),
            pickle.dumps({"a": [Hostile(made)]}),
            system,
            patch,
            patch[:-1] + (checkpoint / ".metadata").read_bytes()[2:],
            b"\x80\x04r\xff\xff\xff\x7f.",
            b"\x80\x04N" + b"\x85" * 200_000 + b".",
            b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",
            b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
            b"cbuiltins\neval\n(S'1'\ntR.",
            b"cpathlib\nPath\n(I1\ntR.",
            b"ctorch\nSize\n((I99999999999\nI-1\nttR.",
            pickle.dumps(None),
            pickle.dumps([1, 2]),
            b"",
        ),
    )
    if rng.random() < 0.7:
        (checkpoint / ".metadata").write_bytes(payload)
    else:
        path = checkpoint / "__0_0.distcp"
        info = pick(rng, list(pickle.loads((checkpoint / ".metadata").read_bytes()).storage_data.values()))
        data = bytearray(path.read_bytes())
        data[info.offset : info.offset + len(payload)] = payload
        path.write_bytes(data)
    reseal(checkpoint)
    return True


def edit_metadata(rng: Rng, checkpoint: Path, state: State) -> bool:
    """Well-formed metadata that says something else of one tensor."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = pick(rng, list(metadata.storage_data))
    place, tensor = metadata.storage_data[index], metadata.state_dict_metadata[index.fqn]
    os.mkfifo(checkpoint.parent / "pipe")
    number = pick(rng, (0, -1, 1, 2**40, -(2**62), 2**70, None, "x", 0.5))
    outside = (
        "../pipe",
        str(checkpoint.parent / "pipe"),
        "/dev/zero",
        "/etc/passwd",
        "nowhere",
        "",
        ".",
        "\0",
        3,
        None,
    )
    edits: tuple[Callable[[], Any], ...] = (
        lambda: setattr(place, "relative_path", pick(rng, outside)),
        lambda: setattr(place, "relative_path", pick(rng, (INFO, ".metadata"))),
        lambda: setattr(place, "offset", number),
        lambda: setattr(place, "length", number),
        lambda: setattr(place, "transform_descriptors", pick(rng, (["zstd"], 3, ["x", None]))),
        lambda: metadata.storage_data.pop(index),
        lambda: metadata.state_dict_metadata.pop(index.fqn),
        lambda: tensor.chunks.clear(),
        lambda: tensor.chunks.append(tensor.chunks[0]),
        lambda: setattr(tensor, "chunks", number),
        lambda: setattr(tensor.chunks[0], "sizes", torch.Size([1] * len(tensor.size))),
        lambda: setattr(tensor.chunks[0], "sizes", torch.Size([2**40] * len(tensor.size))),
        lambda: setattr(tensor.chunks[0], "offsets", torch.Size([1] * len(tensor.size))),
        lambda: setattr(tensor.chunks[0], "offsets", number),
        lambda: setattr(tensor, "size", torch.Size([3])),
        lambda: setattr(tensor, "size", number),
        lambda: setattr(tensor, "properties", number),
        lambda: setattr(tensor.properties, "dtype", pick(rng, (torch.int32, torch.float64, torch.bool, number))),
        lambda: metadata.state_dict_metadata.__setitem__(index.fqn, pick(rng, (number, metadata.storage_meta))),
        lambda: metadata.storage_data.__setitem__(index, number),
        lambda: setattr(metadata, pick(rng, ("storage_data", "state_dict_metadata", "planner_data")), number),
        lambda: metadata.state_dict_metadata.__setitem__(pick(rng, ("rank0/rng", "rank0/new", "new", "")), tensor),
        lambda: metadata.storage_data.__setitem__(index, pick(rng, list(metadata.storage_data.values()))),
    )
    pick(rng, edits)()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(checkpoint)
    return True


def reseal(checkpoint: Path) -> None:
    """Make checkpoint.json agree with the files again, as an attacker would."""
    info = json.loads((checkpoint / INFO).read_text())
    del info["crc32"]
    info["files"] = {name: [len(b := (checkpoint / name).read_bytes()), zlib.crc32(b)] for name in info["files"]}
    info["crc32"] = zlib.crc32(json.dumps(info, sort_keys=True).encode())
    (checkpoint / INFO).write_text(json.dumps(info))


KINDS: dict[str, Callable[[Rng, Path, State], bool]] = {
    "flip": flip,
    "remove": remove,
    "swap": swap,
    "flip and reseal": flip_and_reseal,
    "info": edit_info,
    "pickle": hostile_pickle,
    "metadata": edit_metadata,
}
TARGET = Target("checkpoint", prepare, run)
