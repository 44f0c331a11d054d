"""Filters and fuses on a GPU: gather, product of each view, bias, GELU, residual, LayerNorm in few passes over memory.

The functions have the signatures of ``ssr_rec.kernels``. 16-bit types have one kernel from x to y: a tile of one view's
products never leaves the registers before it is normalised, and only what the backward needs is written beside y.
Other types, and views too wide for that, leave the products to cuBLAS between two kernels. The backward is one pass
for all that is not a product, cuBLAS for the products, and for overlapping views a sum in the order of the views.
Every sum of ours has an order fixed by the shapes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssr_rec.kernels.triton_ics import PROGRAMS, tile_of
from ssr_rec.kernels.triton_view_fusion_kernels import epilogue, epilogue_backward, fused, gather, sum_segments

WIDEST_FUSED = 256
"""Dims of a view whose products one program holds."""
FUSED_TYPES = (torch.bfloat16, torch.float16)
FUSED_ROWS, FUSED_INNER = 64, 32
FUSION = {"enable_fp_fusion": True}
"""Multiply-add as one operation: stated, since Triton's default is about to change."""
SEGMENT_TILE = 32
"""Columns, and rows, of the tile in which the gradients of gathered dims are summed and turned."""


def view_fusion_forward(
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    save: bool,
    keep: Tensor | None = None,
    keep_share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, V, d), the products before the bias (V, B, d), and mean and 1 / deviation of each row (V, B, 2)."""
    batch, (views, _, dim) = x.shape[0], weight.shape
    y = x.new_empty(batch, views, dim)
    summed = save and scale is not None
    stats = x.new_empty(views, batch, 2, dtype=_accumulate(x)) if summed else x.new_empty(0)
    if x.dtype in FUSED_TYPES and dim <= WIDEST_FUSED:
        pre = x.new_empty((views, batch, dim) if save else 0)
        launch_fused(x, indices, weight, bias, residual, scale, shift, eps, keep, keep_share, save, y, pre, stats)
        return y, pre, stats
    pre = torch.bmm(_views(x, indices), weight.to(x.dtype))
    rows, block = tile_of(dim)
    if y.numel():
        with torch.cuda.device_of(x):
            epilogue[(triton.cdiv(batch, rows) * views,)](
                pre,
                *map(_contiguous, (bias, residual, _bytes(keep), scale, shift)),
                y,
                stats if summed else None,
                batch,
                views,
                dim,
                EPS=eps,
                KEPT=1 / keep_share,
                ROWS=rows,
                BLOCK=block,
                A=_type_of(x),
                **FUSION,
            )
    return y, pre if save else x.new_empty(0), stats


def view_fusion_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    pre: Tensor,
    stats: Tensor,
    need_x: bool,
    keep: Tensor | None = None,
    keep_share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias, residual, scale and shift; (0,) for what is None or not needed."""
    batch, (views, _, dim) = x.shape[0], weight.shape
    grad_pre = torch.empty_like(pre)
    grad_residual = x.new_empty(0) if residual is None else grad.new_empty(grad.shape)
    rows, block = tile_of(dim)
    programs = max(1, min(triton.cdiv(batch, rows), PROGRAMS // views))
    sums = torch.zeros(3, programs, views, dim, device=x.device, dtype=_accumulate(x))
    if pre.numel():
        with torch.cuda.device_of(x):
            epilogue_backward[(programs * views,)](
                grad,
                pre,
                *map(_contiguous, (bias, residual, _bytes(keep), scale)),
                None if scale is None else stats,
                grad_pre,
                None if residual is None else grad_residual,
                *sums,
                batch,
                views,
                dim,
                programs,
                *grad.stride(),
                KEPT=1 / keep_share,
                ROWS=rows,
                BLOCK=block,
                A=_type_of(x),
                **FUSION,
            )
    # Each a tensor of its own: an operator's results may not share memory.
    of_bias, of_scale, of_shift = (part.sum(0).to(bias.dtype) for part in sums)
    grad_weight = torch.bmm(_views(x, indices).mT, grad_pre).to(weight.dtype)
    grad_x = _grad_x(grad_pre, x, indices, weight.to(x.dtype)) if need_x else x.new_empty(0)
    of_norm = (x.new_empty(0), x.new_empty(0)) if scale is None else (of_scale, of_shift)
    return grad_x, grad_weight, of_bias, grad_residual, *of_norm


OPERATORS = {"view_fusion_forward": view_fusion_forward, "view_fusion_backward": view_fusion_backward}
"""Of ``torch.ops.ssr_rec``."""


def _grad_x(grad_pre: Tensor, x: Tensor, indices: Tensor | None, weight: Tensor) -> Tensor:
    grad_x = x.new_empty(x.shape)
    if indices is None:
        # (V, B, N) written in place as (B, V, N).
        torch.bmm(grad_pre, weight.mT, out=grad_x.transpose(0, 1))
        return grad_x
    batch, width = x.shape
    # Dims first, so that the sum over the views' copies of a dim reads along rows.
    copies = torch.bmm(weight, grad_pre.mT)
    column, order = torch.sort(indices.flatten(), stable=True)
    ends = torch.searchsorted(column, torch.arange(width + 1, device=x.device))
    if grad_x.numel():
        grid = (triton.cdiv(width, SEGMENT_TILE) * triton.cdiv(batch, SEGMENT_TILE),)
        with torch.cuda.device_of(x):
            sum_segments[grid](
                copies, order, ends, grad_x, batch, width, TILE=SEGMENT_TILE, A=_type_of(x), enable_fp_fusion=True
            )
    return grad_x


def _views(x: Tensor, indices: Tensor | None) -> Tensor:
    """Map (B, width) or (B, V, N) to (V, B, N): what each view's dense layer sees."""
    if indices is None:
        return x.transpose(0, 1)
    views, inner = indices.shape
    h = x.new_empty(views, x.shape[0], inner)
    if h.numel():
        rows, block = tile_of(inner)
        with torch.cuda.device_of(x):
            gather[(triton.cdiv(x.shape[0], rows) * views,)](
                x,
                indices.contiguous(),
                h,
                *x.shape,
                views,
                inner,
                *x.stride(),
                ROWS=rows,
                BLOCK=block,
                **FUSION,
            )
    return h


def launch_fused(
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    keep: Tensor | None,
    keep_share: float,
    save: bool,
    y: Tensor,
    pre: Tensor,
    stats: Tensor,
) -> None:
    """Fill y, and pre and stats where they are not (0,)."""
    if not y.numel():
        return
    batch, (views, inner, dim) = x.shape[0], weight.shape
    # tl.dot needs 16 of each.
    block = max(16, triton.next_power_of_2(dim))
    x_batch, x_view, x_dim = (x.stride(0), 0, x.stride(1)) if x.dim() == 2 else x.stride()
    with torch.cuda.device_of(x):
        fused[(triton.cdiv(batch, FUSED_ROWS) * views,)](
            x,
            *map(_contiguous, (indices, weight, bias, residual, _bytes(keep), scale, shift)),
            y,
            pre if save else None,
            stats if stats.numel() else None,
            batch,
            x.shape[-1],
            views,
            inner,
            dim,
            x_batch,
            x_view,
            x_dim,
            EPS=eps,
            KEPT=1 / keep_share,
            ROWS=FUSED_ROWS,
            BLOCK=block,
            INNER=FUSED_INNER,
            **FUSION,
            num_warps=4 if block <= 128 else 8,
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _bytes(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.view(torch.uint8)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _type_of(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
