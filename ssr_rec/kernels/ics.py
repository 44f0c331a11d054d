"""Computes Iterative Competitive Sparse (ICS), the operator of SSR-D's filter: the paper's Algorithm 1."""

import torch
from torch import Tensor

from ssr_rec.common.errors import UserError
from ssr_rec.kernels.devices import has_operators
from ssr_rec.kernels.reference import ics_reference

FAST_TYPES = (torch.float32, torch.float64, torch.bfloat16)


def ics(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> Tensor:
    """Lets the dims of every view compete: each step lowers all of them by a share of their mean, losers reach zero.

    Algorithm 1 (eq. 7-9, 11), separately for every row and view::

        x_0     = relu(z)
        x_{t+1} = relu(x_t - alpha_t * mean(x_t))        t = 0 .. T-1, mean over all d dims, zeros included
        y       = gamma * x_T

    A negative ``alpha_t`` is legal and raises every dim, dead ones too: nothing here assumes the
    monotone decay of eq. 10, which needs positive alphas.

    The fast form computes ``gamma * relu(z - theta_T)`` with one threshold a row and view while no alpha of the view is
    negative. It differs from the steps above by rounding: within rounding of the threshold a dim may live in one and
    be dead in the other, with a value of that size, and its gradient then goes with its fate. bfloat16 is computed
    in float32. The sums over the batch, for alpha and gamma, are the same in every run and for any number of threads.

    Args:
        z: projected features, (B, V, d).
        alpha: extinction rates, (V, T); with T = 0 the result is ``gamma * relu(z)``.
        gamma: signal recovery, (V, d), or None for none.

    Returns:
        (B, V, d) of z's type, exact zeros where a dim lost.

    Raises:
        UserError: the shapes do not belong together.
    """
    check_shapes(z, alpha, gamma)
    if z.dtype in FAST_TYPES and has_operators(z.device.type):
        return torch.ops.ssr_rec.ics(z, alpha, gamma)
    return ics_reference(z, alpha, gamma).to(z.dtype)


def check_shapes(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> None:
    if z.dim() != 3 or alpha.dim() != 2 or alpha.shape[0] != z.shape[1]:
        raise UserError(f"z {tuple(z.shape)} must be (B, V, d) and alpha {tuple(alpha.shape)} (V, T)")
    if gamma is not None and gamma.shape != z.shape[1:]:
        raise UserError(f"gamma {tuple(gamma.shape)} must be (V, d) of z {tuple(z.shape)}: {tuple(z.shape[1:])}")
