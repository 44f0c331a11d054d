"""A checkpoint on disk: a folder of ``torch.distributed.checkpoint`` that is whole, checked and executes nothing.

``FOLDER/`` holds DCP's files (``__<rank>_0.distcp``, ``.metadata``) and ``checkpoint.json``, written last: everything
that is no tensor, and size and CRC-32 of each of the other files and of itself. The folder is written as
``.NAME.partial`` beside its place and renamed, so a folder with the right name is complete unless somebody damaged it.

Only tensors go into DCP's files: DCP would read anything else by unpickling it.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

INFO_FILE = "checkpoint.json"
FORMAT_VERSION = 1
PARTIAL = ".partial"
SUM_SUFFIX = ".sum"
"""A rank leaves size and CRC of its data file in a small file beside it; the coordinator collects them."""

Tensors = Mapping[str, Tensor | ShardedTensor]


def write_checkpoint(
    tensors: Tensors, info: Mapping[str, Any], folder: Path, process_group: dist.ProcessGroup | None = None
) -> None:
    """Write the folder, replacing one of the same name. Collective.

    Args:
        tensors: name -> tensor; a replicated one is written once, a name that only one rank has by that rank.
        info: what goes into checkpoint.json, as JSON values; that of rank 0 counts.
        process_group: a gloo group; needed in a thread beside other collectives.

    Raises:
        OSError: not writable or disk full, on every rank; nothing half-written stays behind.
    """
    writer = _Writer(folder.with_name(f".{folder.name}{PARTIAL}"), folder, info)
    try:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=process_group)
    except dcp.CheckpointException as error:
        if dist.get_rank(process_group) == 0:
            shutil.rmtree(writer.path, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        raise OSError(f"{folder}: not saved: {first_line(error)} ({free / 2**20:.1f} MiB free there)") from None


def staged(tensors: Tensors) -> dict[str, Tensor | ShardedTensor]:
    """A copy in host memory, to be written while training goes on."""
    return {name: _copied(value) for name, value in tensors.items()}


def _copied(value: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
    if not isinstance(value, ShardedTensor):
        return value.detach().to("cpu", copy=True)
    metadata = copy.deepcopy(value.metadata())
    shards = [Shard(s.tensor.detach().to("cpu", copy=True), copy.deepcopy(s.metadata)) for s in value.local_shards()]
    for place in [*metadata.shards_metadata, *(shard.metadata for shard in shards)]:
        assert place.placement is not None
        place.placement._device = torch.device("cpu")
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, value._process_group)


def read_info(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a complete checkpoint.

    Raises:
        ValueError: no complete checkpoint, or its checkpoint.json is damaged or of another format.
    """
    path = folder / INFO_FILE
    try:
        info = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no complete checkpoint (no {INFO_FILE}); name another one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {first_line(error)}") from None
    if not isinstance(info, dict) or info.pop("crc32", None) != _crc_of(info):
        raise ValueError(f"{path}: damaged: its contents do not have its checksum")
    if info["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path}: format {info['format_version']}, this program reads format {FORMAT_VERSION}")
    return info


def verify(folder: Path) -> None:
    """Read every file and compare size and checksum; the ranks share the files. Collective.

    Raises:
        ValueError: on every rank, with the first damaged or missing file.
    """
    problem: str | None = None
    try:
        files = sorted(read_info(folder)["files"].items())
        for name, (size, crc) in files[dist.get_rank() :: dist.get_world_size()]:
            found = _sum_file(folder / name)
            if found != [size, crc]:
                what = f"{found[0]} of {size} bytes" if found[0] != size else "its contents changed"
                raise ValueError(f"{folder / name}: damaged: {what}")
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}; the checkpoint is damaged"
    except ValueError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise ValueError(text)


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> global size and dtype of every tensor in a checkpoint.

    Raises:
        ValueError: damaged or hostile metadata.
    """
    stored = _metadata(folder).state_dict_metadata
    return {
        name: (value.size, value.properties.dtype)
        for name, value in stored.items()
        if isinstance(value, TensorStorageMetadata)
    }


def read_checkpoint(tensors: Tensors, folder: Path) -> None:
    """Read a checkpoint into ``tensors``, in place, whatever world size wrote it. Collective.

    Raises:
        ValueError: it lacks one of them, or has it in another size; damaged or hostile files.
    """
    stored = stored_tensors(folder)
    for name, tensor in tensors.items():
        if name not in stored or stored[name][0] != tensor.size():
            found = "not there" if name not in stored else f"{tuple(stored[name][0])} there"
            raise ValueError(f"{folder}: does not fit this model: {name} is {tuple(tensor.size())} here, {found}")
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(folder), planner=_TensorPlanner(flatten_state_dict=False))
    except (dcp.CheckpointException, RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: damaged: {first_line(error)}") from None


class _Writer(FileSystemWriter):
    """``FileSystemWriter`` that sums up its files and, when all ranks are done, writes the marker and renames."""

    def __init__(self, work: Path, folder: Path, info: Mapping[str, Any]) -> None:
        super().__init__(work)
        self.folder, self.info = folder, info

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            future = super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save hides the disk's own error behind one about its file format.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None
        for name in {result.storage_data.relative_path for result in future.value()}:
            path = Path(self.path) / name
            path.with_name(name + SUM_SUFFIX).write_text(json.dumps(_sum_file(path)))
        return future

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        work = Path(self.path)
        files = {".metadata": _sum_file(work / ".metadata")}
        for path in work.glob("*" + SUM_SUFFIX):
            files[path.name.removesuffix(SUM_SUFFIX)] = json.loads(path.read_text())
            path.unlink()
        info = {"format_version": FORMAT_VERSION, **self.info, "files": files}
        with open(work / INFO_FILE, "w") as file:
            json.dump({**info, "crc32": _crc_of(info)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        older = work.with_name(f".{self.folder.name}.old{PARTIAL}")
        if self.folder.exists():
            self.folder.rename(older)
        work.rename(self.folder)
        shutil.rmtree(older, ignore_errors=True)
        _sync_folder(self.folder.parent)


class _TensorPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is a pickle, which no checkpoint of ours holds")


class _Reader(FileSystemReader):
    """``FileSystemReader`` whose metadata, a pickle, may only name the classes that a checkpoint consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


ALLOWED = {
    "torch": ("Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("Path", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"checkpoint metadata names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


def _metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}: damaged: {first_line(error)}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: damaged: holds a {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


def _sum_file(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _crc_of(info: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """The last line of a library's message, where they say what went wrong, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
