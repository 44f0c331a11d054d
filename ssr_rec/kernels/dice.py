"""Computes Dice, the activation of DIN's paper, in training: by the mean and the variance of the batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssr_rec.kernels.devices import has_operators

FAST_TYPES = (torch.float32, torch.float64)


def dice(x: Tensor, alpha: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float) -> Tensor:
    """Return Dice of a batch, and move the running statistics towards the batch's (Zhou et al., KDD 2018, eq. 5)::

        p = sigmoid((x - mean) / sqrt(var + eps))      mean and var over the N rows, per dim
        y = p x + (1 - p) alpha x

    On the CPU this is one operator that fetches x twice forward, and x and the gradient twice backward; its sums over
    the rows are the same in every run and for any number of threads.

    Args:
        x: (N, C), N at least 2.
        alpha: (C,), the slope where the gate is closed.
        running_mean: (C,), changed in place, as by ``torch.nn.functional.batch_norm``; ``running_var`` likewise.
        momentum: the batch's share in what the running statistics become.
    """
    if x.dtype in FAST_TYPES and alpha.dtype == x.dtype and x.device.type == "cpu" and has_operators("cpu"):
        y, mean, var = _Dice.apply(x, alpha, eps)
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (x.shape[0] / (x.shape[0] - 1)), momentum)
        return y
    return gated(x, F.batch_norm(x, running_mean, running_var, None, None, True, momentum, eps), alpha)


def gated(x: Tensor, normal: Tensor, alpha: Tensor) -> Tensor:
    """Return ``p x + (1 - p) alpha x`` with p = sigmoid(normal): what is left of Dice once x is normalised."""
    p = torch.sigmoid(normal)
    return x * (p + (1 - p) * alpha)


class _Dice(torch.autograd.Function):
    """Takes Dice and its gradients from the operators; mean and var have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = torch.ops.ssr_rec.dice_forward(x, alpha, eps)
        ctx.save_for_backward(x, mean, var, alpha)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*torch.ops.ssr_rec.dice_backward(grads[0], *ctx.saved_tensors, ctx.eps), None)
