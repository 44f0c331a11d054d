"""Defines the Triton kernels of ``triton_view_fusion``: one tile of rows of one view at a time.

Letters as in ``ssr_rec.over_archs``, N (``inner``) the dims a view's dense layer sees. Tiles are powers of two:
``inside`` marks the entries that exist. ``A`` is the type of the arithmetic. A None leaves its part out.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(u):
    """Return the standard normal distribution function at u: GELU is u times it."""
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _kept(s, keep, at, inside, KEPT: tl.constexpr):
    """Return s times what dropout multiplies it by: what is not a number stays so."""
    if keep is not None:
        s = tl.where(tl.load(keep + at, mask=inside, other=0) != 0, s * KEPT, s * 0.0)
    return s


@triton.jit
def _before_norm(u, residual, keep, at, inside, KEPT: tl.constexpr, A: tl.constexpr):
    s = _kept(u * _halves(u), keep, at, inside, KEPT)
    if residual is not None:
        s += tl.load(residual + at, mask=inside, other=0.0).to(A)
    return s


@triton.jit
def _of_view(parameter, view, dim, column, A: tl.constexpr):
    """Return a view's row of (V, d) as (1, BLOCK)."""
    return tl.load(parameter + view * dim + column, mask=column < dim, other=0.0).to(A)[None, :]


@triton.jit
def _finish(
    u,
    residual,
    keep,
    scale,
    shift,
    y,
    stats,
    row,
    view,
    column,
    batch,
    views,
    dim,
    EPS: tl.constexpr,
    KEPT: tl.constexpr,
    A: tl.constexpr,
):
    """Apply GELU, dropout, residual and LayerNorm to a tile ``u = h W + c``; write y and, if asked for, statistics."""
    valid = row < batch
    inside = valid[:, None] & (column < dim)[None, :]
    at = (row * views + view)[:, None] * dim + column[None, :]
    s = _before_norm(u, residual, keep, at, inside, KEPT, A)
    if scale is not None:
        mean = tl.sum(tl.where(inside, s, 0.0), 1) / dim
        s = tl.where(inside, s - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(s * s, 1) / dim + EPS)
        s = s * inverse[:, None] * _of_view(scale, view, dim, column, A) + _of_view(shift, view, dim, column, A)
        if stats is not None:
            to = stats + (view * batch + row) * 2
            tl.store(to, mean, mask=valid)
            tl.store(to + 1, inverse, mask=valid)
    tl.store(y + at, s, mask=inside)


@triton.jit
def gather(x, indices, h, batch, width, views, inner, x_batch, x_dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write h[v, b, n] = x[b, indices[v, n]], NaN where x has no such dim.

    The views of some rows follow each other, so that the rows stay in a cache.
    """
    view = tl.program_id(0) % views
    row = (tl.program_id(0) // views * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < batch)[:, None] & (column < inner)[None, :]
    source = tl.load(indices + view * inner + column, mask=column < inner, other=0)
    known = inside & (source >= 0)[None, :] & (source < width)[None, :]
    values = tl.load(x + row[:, None] * x_batch + source[None, :] * x_dim, mask=known, other=float("nan"))
    tl.store(h + (view * batch + row)[:, None] * inner + column[None, :], values, mask=inside)


@triton.jit
def epilogue(
    pre,
    bias,
    residual,
    keep,
    scale,
    shift,
    y,
    stats,
    batch,
    views,
    dim,
    EPS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    view = tl.program_id(0) % views
    row = (tl.program_id(0) // views * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = row < batch
    inside = valid[:, None] & (column < dim)[None, :]
    u = tl.load(pre + (view * batch + row)[:, None] * dim + column[None, :], mask=inside, other=0.0).to(A)
    u += _of_view(bias, view, dim, column, A)
    _finish(u, residual, keep, scale, shift, y, stats, row, view, column, batch, views, dim, EPS, KEPT, A)


@triton.jit
def fused(
    x,
    indices,
    weight,
    bias,
    residual,
    keep,
    scale,
    shift,
    y,
    pre,
    stats,
    batch,
    width,
    views,
    inner,
    dim,
    x_batch,
    x_view,
    x_dim,
    EPS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Make y from x (B, width) with indices, or (B, V, N) without; the product accumulates in float32.

    A dim that x does not have is NaN.
    """
    view = tl.program_id(0) % views
    row = (tl.program_id(0) // views * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = row < batch
    inside = valid[:, None] & (column < dim)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, inner, INNER):
        n = first + tl.arange(0, INNER)
        source, there, absent = n, n < inner, 0.0
        if indices is not None:
            source = tl.load(indices + view * inner + n, mask=there, other=0)
            known = (source >= 0) & (source < width)
            there &= known
            absent = tl.where(known, 0.0, float("nan"))[None, :]
        at = row[:, None] * x_batch + view.to(tl.int64) * x_view + source[None, :] * x_dim
        left = tl.load(x + at, mask=valid[:, None] & there[None, :], other=absent)
        kept = (n < inner)[:, None] & (column < dim)[None, :]
        right = tl.load(weight + (view * inner + n)[:, None] * dim + column[None, :], mask=kept, other=0.0)
        total = tl.dot(left, right.to(left.dtype), total)
    # The backward starts from what is saved, so the forward goes on from the same.
    rounded = total.to(y.dtype.element_ty)
    if pre is not None:
        tl.store(pre + (view * batch + row)[:, None] * dim + column[None, :], rounded, mask=inside)
    u = rounded.to(tl.float32) + _of_view(bias, view, dim, column, tl.float32)
    _finish(u, residual, keep, scale, shift, y, stats, row, view, column, batch, views, dim, EPS, KEPT, tl.float32)


@triton.jit
def epilogue_backward(
    grad, pre, bias, residual, keep, scale, stats, grad_pre, grad_residual, grad_bias, grad_scale, grad_shift,
    batch, views, dim, programs, grad_batch, grad_view, grad_dim,
    KEPT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Do every ``programs``-th tile of one view a program, and that program's part of the parameters' gradients."""
    view = tl.program_id(0) % views
    part = tl.program_id(0) // views
    column = tl.arange(0, BLOCK)
    of_bias = _of_view(bias, view, dim, column, A)
    sum_bias = tl.zeros((BLOCK,), A)
    sum_scale = tl.zeros((BLOCK,), A)
    sum_shift = tl.zeros((BLOCK,), A)
    for first in range(part * ROWS, batch, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < batch
        inside = valid[:, None] & (column < dim)[None, :]
        from_grad = row[:, None] * grad_batch + view.to(tl.int64) * grad_view + column[None, :] * grad_dim
        g = tl.load(grad + from_grad, mask=inside, other=0.0).to(A)
        rows_first = (row * views + view)[:, None] * dim + column[None, :]
        views_first = (view * batch + row)[:, None] * dim + column[None, :]
        u = tl.load(pre + views_first, mask=inside, other=0.0).to(A) + of_bias
        if scale is not None:
            s = _before_norm(u, residual, keep, rows_first, inside, KEPT, A)
            mean = tl.load(stats + (view * batch + row) * 2, mask=valid, other=0.0).to(A)
            inverse = tl.load(stats + (view * batch + row) * 2 + 1, mask=valid, other=0.0).to(A)
            normal = tl.where(inside, (s - mean[:, None]) * inverse[:, None], 0.0)
            sum_scale += tl.sum(g * normal, 0)
            sum_shift += tl.sum(g, 0)
            g *= _of_view(scale, view, dim, column, A)
            along = tl.sum(g * normal, 1) / dim
            g = inverse[:, None] * (g - (tl.sum(g, 1) / dim)[:, None] - normal * along[:, None])
        if grad_residual is not None:
            tl.store(grad_residual + rows_first, g, mask=inside)
        g = _kept(g, keep, rows_first, inside, KEPT)
        # u times the normal density, plus its distribution function.
        g *= u * 0.3989422804014327 * tl.exp(-0.5 * u * u) + _halves(u)
        sum_bias += tl.sum(tl.where(inside, g, 0.0), 0)
        tl.store(grad_pre + views_first, g, mask=inside)
    to = (part * views + view) * dim + column
    tl.store(grad_bias + to, sum_bias, mask=column < dim)
    if scale is not None:
        tl.store(grad_scale + to, sum_scale, mask=column < dim)
        tl.store(grad_shift + to, sum_shift, mask=column < dim)


@triton.jit
def sum_segments(copies, order, ends, total, batch, width, TILE: tl.constexpr, A: tl.constexpr):
    """Write total[b, j] = sum of copies[order[i], b] for i from ends[j] to ends[j + 1], in this order."""
    # One axis for both: a grid's others end at 65,535.
    columns = tl.cdiv(width, TILE)
    column = tl.program_id(0) % columns * TILE + tl.arange(0, TILE)
    row = (tl.program_id(0) // columns * TILE + tl.arange(0, TILE)).to(tl.int64)
    first = tl.load(ends + column, mask=column < width, other=0)
    count = tl.load(ends + column + 1, mask=column < width, other=0) - first
    sums = tl.zeros((TILE, TILE), A)
    for step in range(tl.max(count, 0)):
        live = step < count
        copy = tl.load(order + first + step, mask=live, other=0)
        # Loaded for dead columns too, which read the first copy: with both in the mask, Triton 3.6 does not compile.
        found = tl.load(copies + copy[:, None] * batch + row[None, :], mask=(row < batch)[None, :], other=0.0).to(A)
        sums += tl.where(live[:, None], found, 0.0)
    inside = (column < width)[:, None] & (row < batch)[None, :]
    tl.store(total + row[None, :] * width + column[:, None], sums, mask=inside)
