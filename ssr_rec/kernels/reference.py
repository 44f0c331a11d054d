"""Writes the operators of the over-archs plainly: what every fast form must equal, and what runs where none does."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ics_reference(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> Tensor:
    """Run Algorithm 1 step by step; ``ssr_rec.kernels.ics`` says what it computes."""
    x = torch.relu(z)
    for rate in alpha.unbind(-1):
        mu = x.mean(-1, keepdim=True)
        x = torch.relu(x - rate.unsqueeze(-1) * mu)
    return x if gamma is None else gamma * x


def gather_views(x: Tensor, indices: Tensor) -> Tensor:
    """Return for each view the dims of x that indices (V, N) name: (B, width) -> (B, V, N)."""
    return x.index_select(1, indices.flatten()).unflatten(1, indices.shape)


def view_fusion_reference(
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    keep: Tensor | None = None,
    keep_share: float = 1.0,
) -> Tensor:
    """Compute equations 3, 5 and 6 step by step; ``ssr_rec.kernels.view_fusion`` says what it computes."""
    h = x if indices is None else gather_views(x, indices)
    z = F.gelu(torch.baddbmm(bias.unsqueeze(1), h.transpose(0, 1), weight))
    if keep is not None:
        z = z * keep.transpose(0, 1).to(z.dtype).mul_(1 / keep_share)
    if residual is not None:
        z = residual.transpose(0, 1) + z
    if scale is not None and shift is not None:
        z = F.layer_norm(z, z.shape[-1:], eps=eps)
        z = torch.addcmul(shift.unsqueeze(1), z, scale.unsqueeze(1))
    return z.transpose(0, 1)
