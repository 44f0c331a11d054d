"""Save and load a sharded model's weights with ``torch.distributed.checkpoint``, on any number of ranks."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

COMPLETE = "COMPLETE"
"""Marker file: written last, so a folder without it is not a checkpoint."""


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write ``model``'s weights as the folder ``folder``, replacing an older one. Collective.

    The new folder is complete before the old one goes: a crash leaves one of the two, perhaps as ``folder.new``.
    """
    work = folder.with_name(folder.name + ".new")
    if _is_root():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    dcp.save(model.state_dict(), checkpoint_id=work)
    if _is_root():
        (work / COMPLETE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    dist.barrier()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read a folder of ``save_weights`` into ``model``, whatever world size wrote it. Collective.

    Raises:
        ValueError: not a complete checkpoint, or one of another model.
    """
    if not (folder / COMPLETE).is_file():
        raise ValueError(f"{folder}: no complete checkpoint (no {COMPLETE} marker); name another one")
    state = model.state_dict()
    try:
        dcp.load(state, storage_reader=SafeReader(folder))
    except (dcp.CheckpointException, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: does not fit this model or is damaged: {_first_line(error)}") from None
    model.load_state_dict(state)


class SafeReader(FileSystemReader):
    """``FileSystemReader`` whose metadata, a pickle, may only name the classes that a checkpoint consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


ALLOWED = {
    "torch": ("Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
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


def _is_root() -> bool:
    return dist.get_rank() == 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
