"""Computes ICS on a GPU, in Triton: a tile of rows of one view stays in registers for all iterations.

The functions have the signatures of ``ssr_rec.kernels``. Views whose alphas are all at least zero take the closed form:
``x_t = relu(z - theta_t)`` with a threshold per row, so that any ``x_t`` is one subtraction from z; a view with a
negative alpha takes Algorithm 1 as it stands, and its backward repeats the iterations before each step.
Each view decides for itself, inside the kernel. The order of every sum is fixed by the shapes, so that equal inputs
give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Elements of a tile, 8 for each thread. With 32, the backward of T = 5 spills registers when compiled for sm_90."""
PROGRAMS = 2048
"""Programs of the backward, which sum the gradients of alpha and gamma over their rows first."""


def ics_forward(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Map (B, V, d), (V, T), (V, d) or None to the result (B, V, d) of z's type and the means of x_t (B, V, T)."""
    batch, views, dim = z.shape
    accumulate = torch.float64 if z.dtype == torch.float64 else torch.float32
    y = z.new_empty(z.shape)
    means = z.new_empty(batch, views, alpha.shape[1], dtype=accumulate)
    if y.numel():
        rows, block = tile_of(dim)
        with torch.cuda.device_of(z):
            _forward[(triton.cdiv(batch, rows) * views,)](
                z,
                alpha.contiguous(),
                None if gamma is None else gamma.contiguous(),
                y,
                means,
                batch,
                views,
                dim,
                *z.stride(),
                **_constants(alpha, rows, block, accumulate),
            )
    return y, means


def ics_backward(
    grad: Tensor, z: Tensor, means: Tensor, alpha: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of z, alpha and gamma, each of its tensor's shape and type; (0,) without gamma."""
    batch, views, dim = z.shape
    rows, block = tile_of(dim)
    tiles = triton.cdiv(batch, rows)
    # Never the number of processors: the order of the sums would depend on the machine.
    programs = min(tiles, max(1, PROGRAMS // views))
    grad_z = z.new_empty(z.shape)
    grad_alpha = means.new_zeros(programs, *alpha.shape)
    grad_gamma = means.new_zeros((programs, views, dim) if gamma is not None else (1, 0))
    if z.numel():
        with torch.cuda.device_of(z):
            _backward[(programs * views,)](
                grad,
                z,
                means.contiguous(),
                alpha.contiguous(),
                None if gamma is None else gamma.contiguous(),
                grad_z,
                grad_alpha,
                grad_gamma,
                batch,
                views,
                dim,
                programs,
                *grad.stride(),
                *z.stride(),
                **_constants(alpha, rows, block, means.dtype),
            )
    gamma_type = alpha.dtype if gamma is None else gamma.dtype
    return grad_z, grad_alpha.sum(0).to(alpha.dtype), grad_gamma.sum(0).to(gamma_type)


OPERATORS = {"ics_forward": ics_forward, "ics_backward": ics_backward}
"""Of ``torch.ops.ssr_rec``."""


def tile_of(dim: int) -> tuple[int, int]:
    """Return rows and columns of a tile; the columns are all of a view, filled up to a power of two."""
    block = triton.next_power_of_2(dim)
    return max(1, TILE // block), block


def _constants(alpha: Tensor, rows: int, block: int, accumulate: torch.dtype) -> dict[str, object]:
    iterations = alpha.shape[1]
    return {
        "T": iterations,
        "BLOCK_T": triton.next_power_of_2(max(1, iterations)),
        "ROWS": rows,
        "BLOCK": block,
        # Forward and backward must round a threshold alike.
        "enable_fp_fusion": False,
        "A": tl.float64 if accumulate == torch.float64 else tl.float32,
        "num_warps": min(16, rows * block // 256) if block > TILE else 4,
    }


@triton.jit
def _relu(x):
    # tl.maximum would turn a nan into zero.
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def _is_literal(alpha, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return whether a view has an alpha for which the closed form does not hold."""
    t = tl.arange(0, BLOCK_T)
    rates = tl.load(alpha + t, mask=t < T, other=0.0)
    return tl.min(rates, 0) < 0


@triton.jit
def _step(x, z, theta, inside, decay, LITERAL: tl.constexpr):
    """Return x_{t+1} and theta_{t+1} from x_t, theta_t and alpha_t * mean(x_t), a value per row."""
    if LITERAL:
        # A negative alpha would raise the padding too.
        return tl.where(inside, _relu(x - decay[:, None]), 0.0), theta
    theta += decay
    return _relu(z - theta[:, None]), theta


@triton.jit
def _state(z, inside, means, valid, alpha, t: tl.constexpr, A: tl.constexpr, LITERAL: tl.constexpr):
    """Return x_t (ROWS, BLOCK) as the forward met it; ``means`` (ROWS,) points at the T means of each row."""
    x, theta = _relu(z), tl.zeros(means.shape, A)
    for u in tl.static_range(t):
        decay = tl.load(alpha + u).to(A) * tl.load(means + u, mask=valid, other=0.0)
        x, theta = _step(x, z, theta, inside, decay, LITERAL)
    return x


@triton.jit
def _iterate(z, inside, means, valid, alpha, dim, T: tl.constexpr, A: tl.constexpr, LITERAL: tl.constexpr):
    """Return x_T, and write the means on the way."""
    x, theta = _relu(z), tl.zeros(means.shape, A)
    for t in tl.static_range(T):
        mean = tl.sum(x, 1) / dim
        tl.store(means + t, mean, mask=valid)
        x, theta = _step(x, z, theta, inside, tl.load(alpha + t).to(A) * mean, LITERAL)
    return x


@triton.jit
def _forward(
    z,
    alpha,
    gamma,
    y,
    means,
    batch,
    views,
    dim,
    z_batch,
    z_view,
    z_dim,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """Do one tile of rows of one view a program; the views of a row are neighbours in memory, hence in time."""
    view = tl.program_id(0) % views
    row = (tl.program_id(0) // views * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = row < batch
    inside = valid[:, None] & (column < dim)[None, :]
    # A stride of views that lie one behind the other passes 32 bits first.
    z += view.to(tl.int64) * z_view
    tile = tl.load(z + row[:, None] * z_batch + column[None, :] * z_dim, mask=inside, other=0.0).to(A)
    means += (row * views + view) * T
    alpha += view * T
    if _is_literal(alpha, T, BLOCK_T):
        x = _iterate(tile, inside, means, valid, alpha, dim, T, A, True)
    else:
        x = _iterate(tile, inside, means, valid, alpha, dim, T, A, False)
    if gamma is not None:
        x *= tl.load(gamma + view * dim + column, mask=column < dim, other=0.0).to(A)[None, :]
    # Triton casts to the type of y.
    tl.store(y + (row * views + view)[:, None] * dim + column[None, :], x, mask=inside)


@triton.jit
def _through(
    g,
    z,
    inside,
    means,
    valid,
    alpha,
    scale,
    sum_alpha,
    sum_gamma,
    dim,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    A: tl.constexpr,
    LITERAL: tl.constexpr,
):
    """Return the gradient of z from that of y, and the sums for alpha (BLOCK_T,) and gamma (BLOCK,) so far."""
    sum_gamma += tl.sum(g * _state(z, inside, means, valid, alpha, T, A, LITERAL), 0)
    g *= scale[None, :]
    for t in tl.static_range(T - 1, -1, -1):
        # A nan is not "<= 0": its gradient passes, as through torch's relu.
        g = tl.where(_state(z, inside, means, valid, alpha, t + 1, A, LITERAL) <= 0, 0.0, g)
        total = tl.sum(tl.where(inside, g, 0.0), 1)
        mean = tl.load(means + t, mask=valid, other=0.0)
        sum_alpha -= tl.where(tl.arange(0, BLOCK_T) == t, tl.sum(mean * total, 0), 0.0)
        g -= (tl.load(alpha + t).to(A) * total / dim)[:, None]
    return tl.where(z <= 0, 0.0, g), sum_alpha, sum_gamma


@triton.jit
def _backward(
    grad,
    z,
    means,
    alpha,
    gamma,
    grad_z,
    grad_alpha,
    grad_gamma,
    batch,
    views,
    dim,
    programs,
    grad_batch,
    grad_view,
    grad_dim,
    z_batch,
    z_view,
    z_dim,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """Do every ``programs``-th tile of one view a program, and its part of the gradients of alpha and gamma."""
    view = tl.program_id(0) % views
    part = tl.program_id(0) // views
    column = tl.arange(0, BLOCK)
    iteration = tl.arange(0, BLOCK_T)
    alpha += view * T
    z += view.to(tl.int64) * z_view
    grad += view.to(tl.int64) * grad_view
    literal = _is_literal(alpha, T, BLOCK_T)
    scale = tl.full((BLOCK,), 1.0, A)
    if gamma is not None:
        scale = tl.load(gamma + view * dim + column, mask=column < dim, other=0.0).to(A)
    sum_alpha = tl.zeros((BLOCK_T,), A)
    sum_gamma = tl.zeros((BLOCK,), A)
    for first in range(part * ROWS, batch, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < batch
        inside = valid[:, None] & (column < dim)[None, :]
        tile = tl.load(z + row[:, None] * z_batch + column[None, :] * z_dim, mask=inside, other=0.0)
        g = tl.load(grad + row[:, None] * grad_batch + column[None, :] * grad_dim, mask=inside, other=0.0).to(A)
        tile = tile.to(A)
        mean = means + (row * views + view) * T
        if literal:
            g, sum_alpha, sum_gamma = _through(
                g, tile, inside, mean, valid, alpha, scale, sum_alpha, sum_gamma, dim, T, BLOCK_T, A, True
            )
        else:
            g, sum_alpha, sum_gamma = _through(
                g, tile, inside, mean, valid, alpha, scale, sum_alpha, sum_gamma, dim, T, BLOCK_T, A, False
            )
        tl.store(grad_z + (row * views + view)[:, None] * dim + column[None, :], g, mask=inside)
    tl.store(grad_alpha + (part * views + view) * T + iteration, sum_alpha, mask=iteration < T)
    if gamma is not None:
        tl.store(grad_gamma + (part * views + view) * dim + column, sum_gamma, mask=column < dim)
