"""The contract of every over-arch, and the cost figures all of them report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

GELU_FLOPS = 5
"""``0.5 * x * (1 + erf(x * c))``: three multiplications, one addition, one erf."""
LAYER_NORM_FLOPS = 7
"""Mean, subtraction, square, sum of squares, division by the deviation, scale, shift."""
FOLDED_NORM_FLOPS = 2
"""Batch norm at inference: one scale, one shift."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass for ONE sample, dropout off.

    ``matmul`` counts a multiply-add as two, the convention of the paper's tables and of
    ``torch.utils.flop_counter``. ``elementwise`` is everything else at one per arithmetic
    operation and element, an exp, erf or square root being one operation: a bias 1, a ReLU 1, exact GELU
    ``GELU_FLOPS``, LayerNorm ``LAYER_NORM_FLOPS``. A mean over n elements is n. A gather is 0.
    """

    matmul: int = 0
    elementwise: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.elementwise + other.elementwise)

    @property
    def total(self) -> int:
        return self.matmul + self.elementwise


def dense_flops(fan_in: int, fan_out: int, bias: bool = True) -> Flops:
    """Cost of ``x W + c`` for one row."""
    return Flops(matmul=2 * fan_in * fan_out, elementwise=fan_out if bias else 0)


class OverArch(nn.Module, ABC):
    """Turns the concatenated embeddings of a batch into features for the task heads.

    ``forward(x: (B, sum of field dims)) -> (B, H)``, or ``(B, T, H)`` for an over-arch that keeps the
    tasks apart. H is ``out_features``. Heads, losses and tables live elsewhere, so an over-arch works in any
    PyTorch model.

    Args:
        num_fields: F.
        embedding_dim: D, or one dim per field; x holds the fields one after another.
        num_tasks: T; most over-archs serve all tasks with the same features and ignore it.
    """

    out_features: int

    def __init__(self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int) -> None:
        super().__init__()
        self.field_dims = _field_dims(num_fields, embedding_dim)
        self.in_features = sum(self.field_dims)
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks}: an over-arch serves at least one task")
        self.num_tasks = num_tasks

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def flops(self) -> Flops:
        """Cost of one forward pass for one sample."""

    @property
    def flops_per_sample(self) -> int:
        """FLOPs of one forward pass for ONE sample; see ``Flops`` for what is counted."""
        return self.flops().total

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the backbone: no embedding tables, no heads (paper 4.1.2)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _field_dims(num_fields: int, embedding_dim: int | Sequence[int]) -> tuple[int, ...]:
    if num_fields < 1:
        raise ValueError(f"num_fields={num_fields}: an over-arch needs at least one field")
    dims = (embedding_dim,) * num_fields if isinstance(embedding_dim, int) else tuple(embedding_dim)
    if len(dims) != num_fields:
        raise ValueError(f"embedding_dim has {len(dims)} dims for num_fields={num_fields}: give one per field")
    if min(dims) < 1:
        raise ValueError(f"embedding_dim={embedding_dim}: every field needs at least one dim")
    return dims
