"""Computes filter-and-fuse of SSR-S for scoring: no gradients, the samples of a batch side by side."""

import torch
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.kernels.devices import has_operators
from ssr_rec.kernels.reference import gather_views, view_fusion_reference
from ssr_rec.kernels.view_fusion import check_shapes


def view_scoring(
    x: Tensor,
    indices: Tensor,
    weight_t: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    turned: bool = True,
    residual: bool = False,
) -> Tensor:
    """Return ``view_fusion(x, indices, weight_t.mT, ...)`` on the CPU, faster for batches of more than a dozen.

    Args:
        x: (B, width) float32; as the layer before leaves it, it is read fastest.
        indices: (V, N) int64, dims below ``width``.
        weight_t: (V, d, N) float32; or bfloat16, for products of bfloat16 summed in float32.
        bias: (V, d) float32.
        scale: (V, d) float32; None for no LN.
        shift: (V, d) float32, None exactly where ``scale`` is.
        eps: added to the variance of LN.
        weight: (V, N, d), ``weight_t.mT`` contiguous, for batches of a dozen rows or fewer: None has them computed as
            larger ones are, in some 40 us where 20 would do.
        turned: leave the samples side by side, as the next such layer reads them fastest; else y is contiguous.
        residual: add what each view sees before LN; d must be N.

    Returns:
        (B, V, d) float32.

    Raises:
        UserError: the shapes do not belong together, an index is not a dim of x, or a gradient is asked for.
    """
    check_shapes(x, indices, weight_t.mT, bias, None, scale, shift)
    if residual and weight_t.shape[1] != weight_t.shape[2]:
        raise UserError(
            f"residual=True adds N dims to d: weight_t {tuple(weight_t.shape)} must be (V, d, N) with d = N"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_t, bias, scale, shift)):
        raise UserError("view_scoring has no gradients: use it under torch.no_grad, or ssr_rec.kernels.view_fusion")
    if has_operators("cpu"):
        return torch.ops.ssr_rec.view_scoring(x, indices, weight_t, bias, scale, shift, eps, weight, turned, residual)
    seen = gather_views(x, indices) if residual else None
    if weight_t.dtype == torch.bfloat16 and weight_t.shape[2] % 2 == 0:
        x = x.to(torch.bfloat16).float()  # as the operator does
    return view_fusion_reference(x, indices, weight_t.mT.to(bias.dtype), bias, seen, scale, shift, eps)
