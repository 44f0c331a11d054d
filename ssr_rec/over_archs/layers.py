"""Defines what several over-archs share: initialisers, input normalisation, dense stacks, per-view dense and norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.over_archs.base import FOLDED_NORM_FLOPS, GELU_FLOPS, LAYER_NORM_FLOPS, Flops, dense_flops
from ssr_rec.over_archs.settings import LAYER_NORM_EPS, Initializer, InputNormKind

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01
"""Weight of the new batch; Keras writes the same as momentum 0.99, the weight of the old value."""


def init_dense_(
    weight: Tensor, bias: Tensor | None, fan_in: int, fan_out: int, initializer: Initializer, normal: bool = False
) -> None:
    """Initialises a dense layer in place.

    The fans are arguments because ``nn.init`` reads them off the shape, and takes a (V, in, out)
    stack for a convolution: its Glorot variance would shrink with the number of views.

    Args:
        initializer: "glorot": variance 2 / (fan_in + fan_out), zero bias. "torch": nn.Linear's own, weight and
            bias uniform within 1 / sqrt(fan_in).
        normal: draw Glorot weights from a normal instead of a uniform distribution.
    """
    bound = 1 / math.sqrt(fan_in)
    std = math.sqrt(2 / (fan_in + fan_out))
    if initializer == "torch":
        nn.init.uniform_(weight, -bound, bound)
    elif normal:
        nn.init.normal_(weight, 0.0, std)
    else:
        nn.init.uniform_(weight, -math.sqrt(3) * std, math.sqrt(3) * std)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound) if initializer == "torch" else nn.init.zeros_(bias)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and its parts into eval mode inside the block, and each back into its own after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class InputNorm(nn.Module):
    """Applies batch norm to the input vector, with a mean, variance, scale and shift for what ``kind`` says.

    ``per_dim``: each of its F*D numbers; ``per_field``: each field, over its dims; ``across_fields``: each of the D
    dims of an embedding, over the fields. The last two need fields of equal dims. In training each process normalises
    with its own share of the batch.
    """

    def __init__(
        self,
        kind: Literal["per_dim", "per_field", "across_fields"],
        field_dims: Sequence[int],
        momentum: float = BATCH_NORM_MOMENTUM,
    ) -> None:
        super().__init__()
        if kind != "per_dim" and len(set(field_dims)) > 1:
            raise UserError(
                f"input_norm={kind!r} needs fields of equal dims, got {list(field_dims)}: use input_norm='per_dim'"
            )
        self.momentum = momentum
        self.width = sum(field_dims)
        self.across_fields = kind == "across_fields"
        self.channels = {"per_dim": self.width, "per_field": len(field_dims), "across_fields": field_dims[0]}[kind]
        self.weight = nn.Parameter(torch.ones(self.channels))
        self.bias = nn.Parameter(torch.zeros(self.channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(self.channels))
        self.register_buffer("running_var", torch.ones(self.channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, F*D) to (B, F*D)."""
        # One row has no variance; the last batch of an epoch may be one.
        use_batch = self.training and x.shape[0] > 1
        shape = (-1, self.channels) if self.across_fields else (self.channels, -1)
        grouped = x.unflatten(1, shape)
        y = F.batch_norm(
            grouped.transpose(1, 2) if self.across_fields else grouped,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=use_batch,
            momentum=self.momentum,
            eps=BATCH_NORM_EPS,
        )
        return (y.transpose(1, 2) if self.across_fields else y).flatten(1)

    def flops(self) -> Flops:
        return Flops(elementwise=FOLDED_NORM_FLOPS * self.width)


class NoNorm(nn.Identity):
    """Stands where an over-arch has no ``InputNorm``."""

    def flops(self) -> Flops:
        return Flops()


def make_input_norm(kind: InputNormKind, field_dims: Sequence[int]) -> InputNorm | NoNorm:
    """Return what an over-arch does to its input first: (B, F*D) -> (B, F*D)."""
    return NoNorm() if kind == "none" else InputNorm(kind, field_dims)


class Dropout(nn.Dropout):
    """Does what ``nn.Dropout`` does; on the CPU, where that can take as long as a dense layer, in a fifth of its time.

    Each element stays with a probability of ``1 - p``, rounded to whole 65,536ths on the CPU, and is divided by it.
    """

    def draw(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, float]:
        """Return which elements stay, as a bool tensor of this shape, and the probability with which each did."""
        if torch.compiler.is_compiling():
            return torch.rand(shape, device=device) < 1 - self.p, 1 - self.p
        if device.type != "cpu" or not 1e-3 <= self.p <= 1 - 1e-3:
            return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - self.p), 1 - self.p
        dropped, elements = round(self.p * 2**16), math.prod(shape)
        # Four numbers of 16 bits each.
        draws = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        return (draws[:elements] >= dropped - 2**15).view(shape), 1 - dropped / 2**16

    def forward(self, x: Tensor) -> Tensor:
        """Map (...) to (...)."""
        if not self.training or self.p in (0, 1) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        keep, share = self.draw(x.shape, x.device)
        return x * keep.to(x.dtype).mul_(1 / share)


class DenseStack(nn.Sequential):
    """Stacks dense layers, each with its LayerNorm (if any), activation and dropout (if any); empty: the identity."""

    def __init__(
        self,
        fan_in: int,
        hidden: Sequence[int],
        initializer: Initializer,
        activation: Literal["relu", "gelu"] = "relu",
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for width in hidden:
            linear = nn.Linear(fan_in, width)
            init_dense_(linear.weight, linear.bias, fan_in, width, initializer)
            self.append(linear)
            if layer_norm:
                self.append(nn.LayerNorm(width, eps=LAYER_NORM_EPS))
            self.append(nn.ReLU() if activation == "relu" else nn.GELU())
            if dropout:
                self.append(Dropout(dropout))
            fan_in = width

    def flops(self) -> Flops:
        total, width = Flops(), 0
        for layer in self:
            if isinstance(layer, nn.Linear):
                width = layer.out_features
                total += dense_flops(layer.in_features, width)
            elif isinstance(layer, nn.LayerNorm):
                total += Flops(elementwise=LAYER_NORM_FLOPS * width)
            elif isinstance(layer, nn.GELU):
                total += Flops(elementwise=GELU_FLOPS * width)
            elif isinstance(layer, nn.ReLU):
                total += Flops(elementwise=width)
        return total


class ViewLinear(nn.Module):
    """Runs V dense layers side by side, each with its own weight and bias: the block-diagonal layer of paper 2.3."""

    def __init__(self, num_views: int, fan_in: int, fan_out: int, initializer: Initializer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_views, fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(num_views, fan_out))
        init_dense_(self.weight, self.bias, fan_in, fan_out, initializer)

    def forward(self, x: Tensor) -> Tensor:
        """Map (V, B, in) to (V, B, out)."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)

    def flops(self) -> Flops:
        num_views, fan_in, fan_out = self.weight.shape
        one = dense_flops(fan_in, fan_out)
        return Flops(num_views * one.matmul, num_views * one.elementwise)


class ViewLayerNorm(nn.Module):
    """Holds scale and shift (V, d) of a LayerNorm over the dims of each view, which ``view_fusion`` applies."""

    def __init__(self, num_views: int, view_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_views, view_dim))
        self.bias = nn.Parameter(torch.zeros(num_views, view_dim))
        self.eps = eps

    def flops(self) -> Flops:
        return Flops(elementwise=LAYER_NORM_FLOPS * self.weight.numel())
