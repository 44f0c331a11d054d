"""The operators in NumPy, row by row and step by step, with gradients by hand: written apart from all torch forms."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ssr_rec.kernels import extension

Array = NDArray[np.float64]

needs_compiler = pytest.mark.skipif(not extension.load(), reason="the C++ operators cannot be built here")


def ics_by_loops(z: Array, alpha: Array, gamma: Array, grad: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """Algorithm 1 and the gradients of ``(y * grad).sum()`` with respect to z (B, V, d), alpha (V, T), gamma (V, d)."""
    y, grad_z = np.zeros_like(z), np.zeros_like(z)
    grad_alpha, grad_gamma = np.zeros_like(alpha), np.zeros_like(gamma)
    for b, v in np.ndindex(z.shape[:2]):
        states, means = [np.maximum(z[b, v], 0)], []
        for rate in alpha[v]:
            means.append(states[-1].sum() / z.shape[2])
            states.append(np.maximum(states[-1] - rate * means[-1], 0))
        y[b, v] = gamma[v] * states[-1]
        grad_gamma[v] += grad[b, v] * states[-1]
        g = grad[b, v] * gamma[v]
        for t in reversed(range(len(means))):
            g = np.where(states[t + 1] > 0, g, 0)
            grad_alpha[v, t] -= g.sum() * means[t]
            g = g - alpha[v, t] * g.sum() / z.shape[2]
        grad_z[b, v] = np.where(states[0] > 0, g, 0)
    return y, (grad_z, grad_alpha, grad_gamma)


def fusion_by_loops(
    h: Array,
    weight: Array,
    bias: Array,
    residual: Array | None,
    scale: Array | None,
    shift: Array | None,
    eps: float,
    keep: NDArray[np.bool_] | None = None,
    keep_share: float = 1.0,
) -> Array:
    """Equations 5 and 6 for what the views see, h (B, V, N): (B, V, d)."""
    y = np.zeros((*h.shape[:2], weight.shape[2]))
    for b, v in np.ndindex(h.shape[:2]):
        z = h[b, v] @ weight[v] + bias[v]
        a = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in z])
        if keep is not None:
            a = np.array([value / keep_share if kept else 0.0 for value, kept in zip(a, keep[b, v], strict=True)])
        if residual is not None:
            a = a + residual[b, v]
        if scale is not None and shift is not None:
            a = (a - a.mean()) / math.sqrt(((a - a.mean()) ** 2).mean() + eps) * scale[v] + shift[v]
        y[b, v] = a
    return y
