"""Says which devices have fast forms of the operators, and loads or registers these at the first use."""

import functools
import os
import warnings

import torch

from ssr_rec.kernels import extension


@torch.compiler.assume_constant_result
def has_operators(device_type: str) -> bool:
    """Return whether the operators ``torch.ops.ssr_rec`` have implementations for tensors of this device type.

    The operators themselves are defined in the C++ library, so a GPU needs it too. Where something is missing, one
    warning a process on local rank 0 says what, and the plain forms serve.
    """
    if device_type == "cuda":
        return register_triton("CUDA") is not None
    return device_type == "cpu" and extension.load()


@functools.cache
def register_triton(key: str) -> torch.library.Library | None:
    """Makes the Triton kernels the implementations for a dispatch key; None where that cannot be."""
    if not extension.load():
        return None
    try:
        from ssr_rec.kernels import triton_ics, triton_view_fusion
    except ImportError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(f"ssr_rec runs its plain, slower operators: {error}", RuntimeWarning, stacklevel=3)
        return None
    # The registration ends with the object; the cache keeps it.
    library = torch.library.Library("ssr_rec", "IMPL")
    for module in (triton_ics, triton_view_fusion):
        for name, function in module.OPERATORS.items():
            library.impl(name, function, key)
    return library
