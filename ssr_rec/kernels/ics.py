"""Iterative Competitive Sparse (ICS), the operator of SSR-D's filter: the paper's Algorithm 1."""

import torch
from torch import Tensor


def ics(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> Tensor:
    """Lets the dims of every view compete: each step lowers all of them by a share of their mean, losers reach zero.

    Algorithm 1 (eq. 7-9, 11), separately for every row and view::

        x_0     = relu(z)
        x_{t+1} = relu(x_t - alpha_t * mean(x_t))        t = 0 .. T-1, mean over all d dims, zeros included
        y       = gamma * x_T

    A negative ``alpha_t`` is legal and raises every dim, dead ones too: nothing here assumes the
    monotone decay of eq. 10, which needs positive alphas.

    Args:
        z: projected features, (B, V, d).
        alpha: extinction rates, (V, T); with T = 0 the result is ``gamma * relu(z)``.
        gamma: signal recovery, (V, d), or None for none.

    Returns:
        (B, V, d), exact zeros where a dim lost.
    """
    x = torch.relu(z)
    for rate in alpha.unbind(-1):
        mu = x.mean(-1, keepdim=True)
        x = torch.relu(x - rate.unsqueeze(-1) * mu)
    return x if gamma is None else gamma * x
