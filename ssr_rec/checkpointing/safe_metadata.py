"""Reads ``.metadata`` of a checkpoint, a pickle that says where each tensor is, without trusting it.

DCP opens the files it names, and leaves a tensor as it was where it names no chunk. So before DCP sees it, every place
must lie within a file whose checksum was verified, and the chunks of a tensor must cover it exactly once.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ssr_rec.common.errors import UserError

METADATA_FILE = ".metadata"

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
MODULES = {"pathlib._local": "pathlib"}
"""Where Python 3.13 says that classes are -> where they are for every other."""


# The unpickler in C would let a pickle set attributes of the allowed classes themselves.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Makes instances of the classes that a checkpoint consists of, and nothing else."""

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        module = MODULES.get(module, module)
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"checkpoint metadata names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)

    def load_build(self) -> None:
        target = self.stack[-2]
        if isinstance(target, type) or callable(target):
            raise pickle.UnpicklingError(f"checkpoint metadata changes {target!r}, which no checkpoint of ours does")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(folder: Path, files: Mapping[str, Any]) -> Metadata:
    """Return the metadata of a checkpoint.

    Args:
        files: name -> (bytes, checksum) of the checkpoint's files, verified.

    Raises:
        UserError: damaged or hostile; names the file.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        problem = _problem(metadata, files)
    except Exception as error:  # a damaged pickle may raise anything, and so may what came out of it
        problem = " ".join(str(error).split())[:300] or type(error).__name__
    if problem:
        raise UserError(f"{path}: damaged: {problem}")
    return metadata


def _problem(metadata: Any, files: Mapping[str, Any]) -> str | None:
    if not isinstance(metadata, Metadata):
        return f"holds a {type(metadata).__name__}, not a checkpoint's metadata"
    if not isinstance(metadata.storage_meta, StorageMeta | None):
        return "storage_meta is of another kind"
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorStorageMetadata):
            return f"{name!r} is no tensor"
        if not isinstance(tensor.properties, TensorProperties) or not isinstance(tensor.properties.dtype, torch.dtype):
            return f"{name} has no dtype"
        boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks if isinstance(chunk, ChunkStorageMetadata)]
        if len(boxes) != len(tensor.chunks) or not _cover(boxes, tensor.size):
            return f"the chunks of {name} are not the whole of it"
        for offsets, _ in boxes:
            place = metadata.storage_data.get(MetadataIndex(name, offsets))
            if not isinstance(place, _StorageInfo) or place.relative_path not in files:
                return f"{name} is in none of the checkpoint's files"
            if place.transform_descriptors or not _within(place.offset, place.length, files[place.relative_path][0]):
                return f"{name} is not within {place.relative_path}"
    return None


def _cover(boxes: list[tuple[Any, Any]], size: Any) -> bool:
    """Return whether boxes of (offsets, sizes) are within ``size``, disjoint, and of its volume together."""
    for offsets, sizes in boxes:
        if not all(isinstance(shape, torch.Size) and len(shape) == len(size) for shape in (offsets, sizes, size)):
            return False
        if not all(_within(*extent) for extent in zip(offsets, sizes, size, strict=True)):
            return False
    for at, (offsets, sizes) in enumerate(boxes):
        for other_offsets, other_sizes in boxes[:at]:
            extents = zip(offsets, sizes, other_offsets, other_sizes, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in extents):
                return False
    return sum(math.prod(sizes) for _, sizes in boxes) == math.prod(size)


def _within(start: Any, length: Any, end: int) -> bool:
    return isinstance(start, int) and isinstance(length, int) and start >= 0 and length >= 0 and start + length <= end
