"""Counts the bytes of a step: what its operators read and write, what it keeps for the backward, its peak on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITE_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_"}
"""Operators that overwrite their first argument unread."""
UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operators whose result nobody has written yet."""


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return bytes of the elements; those that an expanded tensor repeats count once."""
    return sum(
        t.element_size() * int(np.prod([n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0]))
        for t in tensors
    )


class _Traffic(TorchDispatchMode):
    """Adds up what operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # By storage, not by schema: _unsafe_view does not say that it is one.
        is_view = not func._schema.is_mutable and not _storages(written).isdisjoint(_storages(read))
        if not is_view and name not in UNTOUCHED:
            self.bytes += size_of(read[1:] if name in WRITE_ONLY else read) + size_of(written)
        return result


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def bytes_moved(step: Callable[[], object]) -> int:
    """Return what the operators of one eager step read and write."""
    with _Traffic() as traffic:
        step()
    return traffic.bytes


def saved_bytes(step: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Return bytes of the storages that one step keeps for its backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in resident}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            # Or a storage freed early would lend its address to a later one.
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(found.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """GPU memory of one step above what was allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
