"""Computes filter-and-fuse: the view-wise dense layer of SSR with what stands before and behind it."""

import torch
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.kernels.devices import has_operators
from ssr_rec.kernels.reference import view_fusion_reference

FAST_TYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


def view_fusion(
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    keep: Tensor | None = None,
    keep_share: float = 1.0,
) -> Tensor:
    """Apply one dense layer per view: ``LN(dropout(gelu(h W + bias)) + residual) * scale + shift`` (eq. 3, 5 and 6).

    ``h`` is ``x``, or, with ``indices``, for each view the dims of ``x`` that they name. GELU is the exact one; LN goes
    over the d dims of a view. The fast form computes it block by block of rows and gathers again in the backward pass;
    its sums over the batch are the same in every run and for any number of threads. On the CPU, autocast leaves it in
    the type of its weights, in which it is faster than the plain form in bfloat16.

    Args:
        x: (B, width) with ``indices``, else (B, V, N).
        indices: (V, N) int64, dims below ``width``.
        weight: (V, N, d).
        bias: (V, d).
        residual: (B, V, d), added before LN; None for none.
        scale: (V, d); None for no LN at all.
        shift: (V, d), None exactly where ``scale`` is.
        eps: added to the variance of LN.
        keep: (B, V, d) bool, the dims that dropout leaves; None for no dropout.
        keep_share: what they are divided by, the probability of staying.

    Returns:
        (B, V, d), of the type of the weights; on a GPU under autocast, of autocast's.

    Raises:
        UserError: the shapes do not belong together, or an index is not a dim of x; on a GPU, which nobody waits
            for, what a view sees there is NaN instead.
    """
    check_shapes(x, indices, weight, bias, residual, scale, shift, keep)
    device = x.device.type
    if device in FAST_TYPES and torch.is_autocast_enabled(device):
        # A GPU's form has products of 16 bits, as autocast wants them; the CPU's has none.
        dtype = weight.dtype if device == "cpu" else torch.get_autocast_dtype(device)
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    parameters = {t.dtype for t in (weight, bias, scale, shift) if t is not None}
    if _has_form(x, residual, parameters) and has_operators(device):
        return torch.ops.ssr_rec.view_fusion(x, indices, weight, bias, residual, scale, shift, eps, keep, keep_share)
    return view_fusion_reference(x, indices, weight, bias, residual, scale, shift, eps, keep, keep_share)


def _has_form(x: Tensor, residual: Tensor | None, parameters: set[torch.dtype]) -> bool:
    """Return whether these types have a fast form; on a GPU, float32 parameters go with 16-bit activations."""
    if x.dtype not in FAST_TYPES.get(x.device.type, ()) or (residual is not None and residual.dtype != x.dtype):
        return False
    mixed = x.device.type == "cuda" and x.dtype.itemsize == 2
    return parameters == {x.dtype} or (mixed and parameters == {torch.float32})


def check_shapes(
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    keep: Tensor | None = None,
) -> None:
    views, seen, dim = weight.shape
    if indices is None and x.shape[1:] != (views, seen):
        raise UserError(f"x {tuple(x.shape)} must be (B, V, N) of weight {tuple(weight.shape)} = (V, N, d)")
    if indices is not None and (x.dim() != 2 or indices.shape != (views, seen)):
        raise UserError(
            f"x {tuple(x.shape)} must be (B, width), indices {tuple(indices.shape)} (V, N) of {tuple(weight.shape)}"
        )
    for name, tensor in (("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.shape != (views, dim):
            raise UserError(f"{name} {tuple(tensor.shape)} must be (V, d) = {(views, dim)}")
    for name, tensor in (("residual", residual), ("keep", keep)):
        if tensor is not None and tensor.shape != (x.shape[0], views, dim):
            raise UserError(f"{name} {tuple(tensor.shape)} must be (B, V, d) = {(x.shape[0], views, dim)}")
    if keep is not None and keep.dtype != torch.bool:
        raise UserError(f"keep is {keep.dtype}: it must be bool, true where dropout leaves a dim")
    if (scale is None) != (shift is None):
        raise UserError("scale and shift come together: give both, or neither for no LayerNorm")
