"""Writes and reads checkpoints: folders of ``torch.distributed.checkpoint``, whole, checked and executing nothing.

``FOLDER/`` holds DCP's files (``__<rank>_0.distcp``, ``.metadata``) and ``checkpoint.json``, written last: everything
that is no tensor, and size and CRC-32 of each of the other files and of itself. The folder is written as
``.NAME.partial`` beside its place and renamed, so a folder with the right name is complete unless somebody damaged it.

Only tensors go into DCP's files: DCP would read anything else by unpickling it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
import warnings
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from ssr_rec.checkpointing.safe_metadata import METADATA_FILE, read_metadata
from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import canonical_json, parse_json, read_text
from ssr_rec.common.settings import first_problem
from ssr_rec.common.whole_files import replace_folder

INFO_FILE = "checkpoint.json"
FORMAT_VERSION = 1
MAX_INFO_BYTES = 2**26
"""Some 500,000 files."""
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
        raise OSError(f"{folder}: not saved: {last_line(error)} ({free / 2**20:.1f} MiB free there)") from None


def staged(tensors: Tensors) -> dict[str, Tensor | ShardedTensor]:
    """Return a copy in host memory, to be written while training goes on."""
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
    """Read checkpoint.json of a complete checkpoint.

    Raises:
        UserError: no complete checkpoint, or its checkpoint.json is damaged or of another format.
    """
    path = folder / INFO_FILE
    if not os.path.lexists(path):
        raise UserError(f"{folder}: no complete checkpoint (no {INFO_FILE}); name another one")
    text = read_text(path, MAX_INFO_BYTES, "the checkpoint is damaged")
    try:
        info = parse_json(text, nan=True)  # a measure that is not defined
    except ValueError as error:
        raise UserError(f"{path}: damaged: {last_line(error)}") from None
    if not isinstance(info, dict) or info.pop("crc32", None) != _crc_of(info):
        raise UserError(f"{path}: damaged: its contents do not have its checksum")
    if (version := info.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path}: format {version!r:.80}, this program reads format {FORMAT_VERSION}")
    try:
        _Info.model_validate(info)
    except ValidationError as error:
        raise UserError(f"{path}: damaged: {first_problem(error)}") from None
    return info


class _Info(BaseModel):
    """Checks what every checkpoint.json holds, and what a training checkpoint's holds besides."""

    model_config = ConfigDict(strict=True)

    kind: Literal["weights", "training"]
    step: int = Field(ge=0)
    files: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]
    world_size: int = Field(1, ge=1)
    position: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    fitted: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Info:
        for name in self.files:
            if Path(name).name != name:
                raise UserError(f"the file {name!r} is not within the checkpoint")
        if METADATA_FILE not in self.files:
            raise UserError(f"the list of files lacks {METADATA_FILE}")
        if self.kind == "training" and None in (self.position, self.config, self.fitted):
            raise UserError("a training checkpoint needs position, config and fitted")
        return self


def verify(folder: Path) -> None:
    """Read every file and compare size and checksum; the ranks, if there are any, share the files. Collective.

    Raises:
        UserError: on every rank, with the first damaged or missing file.
    """
    problem: str | None = None
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        files = sorted(read_info(folder)["files"].items())
        for name, (size, crc) in files[rank::ranks]:
            path = folder / name
            there = path.stat()
            if not stat.S_ISREG(there.st_mode):
                raise UserError(f"{path}: damaged: not a regular file")
            if there.st_size != size or _sum_file(path) != [size, crc]:
                what = f"{there.st_size} of {size} bytes" if there.st_size != size else "its contents changed"
                raise UserError(f"{path}: damaged: {what}")
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}; the checkpoint is damaged"
    except ValueError as error:
        problem = str(error)
    problems: list[str | None] = [problem] * ranks
    if dist.is_initialized():
        dist.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise UserError(text)


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return name -> global size and dtype of every tensor in a checkpoint.

    Raises:
        UserError: damaged or hostile metadata.
    """
    stored = read_metadata(folder, read_info(folder)["files"]).state_dict_metadata
    return {
        name: (value.size, value.properties.dtype)
        for name, value in stored.items()
        if isinstance(value, TensorStorageMetadata)
    }


def read_checkpoint(tensors: Tensors, folder: Path, alone: bool = False) -> None:
    """Read a checkpoint into ``tensors``, in place, whatever world size wrote it. Collective where there are ranks.

    Args:
        alone: this rank reads whole tensors for itself; not collective.

    Raises:
        UserError: it lacks one of them, or has it in another size; damaged or hostile files.
    """
    stored = stored_tensors(folder)
    for name, tensor in tensors.items():
        size, dtype = stored.get(name, (None, None))
        if size != tensor.size() or dtype != tensor.dtype:
            found = "not there" if size is None else f"{tuple(size)} {dtype} there"
            here = f"{tuple(tensor.size())} {tensor.dtype}"
            raise UserError(f"{folder}: does not fit this model: {name} is {here} here, {found}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which one process may want
            planner = _TensorPlanner(flatten_state_dict=False)
            dcp.load(dict(tensors), storage_reader=_Reader(folder), planner=planner, no_dist=alone)
    except (dcp.CheckpointException, Exception) as error:  # a damaged file may raise anything in DCP and torch.load
        raise UserError(f"{folder}: damaged: {last_line(error)}") from None


class _Writer(FileSystemWriter):
    """Writes as ``FileSystemWriter``, sums up its files and, when all ranks are done, writes the marker and renames."""

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
        files = {METADATA_FILE: _sum_file(work / METADATA_FILE)}
        for path in work.glob("*" + SUM_SUFFIX):
            files[path.name.removesuffix(SUM_SUFFIX)] = json.loads(path.read_text())
            path.unlink()
        info = {"format_version": FORMAT_VERSION, **self.info, "files": files}
        with open(work / INFO_FILE, "w") as file:
            json.dump({**info, "crc32": _crc_of(info)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        replace_folder(work, self.folder, work.with_name(f".{self.folder.name}.old{PARTIAL}"))
        _sync_folder(self.folder.parent)


class _TensorPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is a pickle, which no checkpoint of ours holds")


class _Reader(FileSystemReader):
    """Reads as ``FileSystemReader``, but does not trust the metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        metadata = read_metadata(folder, read_info(folder)["files"])
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _sum_file(path: Path) -> list[int]:
    """Return bytes and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _crc_of(info: Mapping[str, Any]) -> int:
    return zlib.crc32(canonical_json(info))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_line(error: BaseException) -> str:
    """Return the last line of a library's message, where they say what went wrong, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
