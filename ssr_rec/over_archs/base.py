"""Defines the contract of every over-arch, and the cost figures all of them report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer

from ssr_rec.common.errors import UserError

if TYPE_CHECKING:
    from ssr_rec.over_archs.adaptive import Adapts, Ranks, States

SOFTMAX_FLOPS = 5
"""Maximum, subtraction, exp, sum, division."""
GELU_FLOPS = 5
"""``0.5 * x * (1 + erf(x * c))``: three multiplications, one addition, one erf."""
LAYER_NORM_FLOPS = 7
"""Mean, subtraction, square, sum of squares, division by the deviation, scale, shift."""
FOLDED_NORM_FLOPS = 2
"""Batch norm at inference: one scale, one shift."""


@dataclass(frozen=True)
class Flops:
    """Counts floating-point operations of one forward pass for ONE sample, dropout off.

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
    """Return the cost of ``x W + c`` for one row."""
    return Flops(matmul=2 * fan_in * fan_out, elementwise=fan_out if bias else 0)


class Domain(NamedTuple):
    """Names the column whose id is a row's domain, and says how many ids it has, from 0 on."""

    name: str
    size: int


class OverArch(nn.Module, ABC):
    """Turns the concatenated embeddings of a batch into features for the task heads.

    ``forward(x: (B, sum of field dims), *extra) -> features``: ``(B, H)``, or ``(B, T, H)`` for an over-arch that
    keeps the tasks apart. H is ``out_features``. One with terms that no head may weigh (the first order and the FM
    of DeepFM) returns ``(features, logits (B, T))``; the logits are added to those of the heads. Heads, losses and
    tables live elsewhere, so an over-arch works in any PyTorch model.

    One whose class says ``takes_domain`` is built with a further keyword ``domain``, and may keep it. If it does,
    ``forward``, ``look`` and ``statistics`` get the ids (B,) of the rows' domains as their last argument.

    Attributes:
        out_features: H.
        domain: what its weights depend on besides x; None: on nothing.
        settings_class: the pydantic model of its settings; of a class of one's own, which a config names by its path.
        extra_tables: further tables that every field has for this over-arch alone: name -> a dim per field. Their
            embeddings (B, sum of those dims) arrive as ``extra``, in this order, fields one after another.
        task_parts: names of its parameters, modules and extra tables of which some are of one task each, in the order
            of the labels.
        optimizers: parameters that the run's dense optimizer must leave alone: name -> what makes their own.

    Args:
        num_fields: F.
        embedding_dim: D, or one dim per field; x holds the fields one after another.
        num_tasks: T; most over-archs serve all tasks with the same features and ignore it.
    """

    out_features: int
    settings_class: ClassVar[type[BaseModel]]
    takes_domain: ClassVar[bool] = False
    task_parts: ClassVar[tuple[str, ...]] = ()
    forward: Callable[..., Tensor | tuple[Tensor, Tensor]]

    def __init__(self, num_fields: int, embedding_dim: int | Sequence[int], num_tasks: int) -> None:
        super().__init__()
        self.field_dims = _field_dims(num_fields, embedding_dim)
        self.in_features = sum(self.field_dims)
        if num_tasks < 1:
            raise UserError(f"num_tasks={num_tasks}: an over-arch serves at least one task")
        self.num_tasks = num_tasks
        self.domain: Domain | None = None
        self.extra_tables: dict[str, tuple[int, ...]] = {}
        self.optimizers: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {}
        self.register_forward_pre_hook(_check_width)

    @abstractmethod
    def flops(self) -> Flops:
        """Return the cost of one forward pass for one sample."""

    def statistics(self, x: Tensor, field_names: Sequence[str]) -> dict[str, Any]:
        """Return what a report says of the trained over-arch, on the batch x (B, sum of field dims), as JSON values."""
        return {}

    def sparse_filters(self) -> list[nn.Module]:
        """Return the modules whose outputs' exact zeros a run watches while it trains, first layer to last."""
        return []

    def adapts(self) -> Adapts | None:
        """Return when this over-arch changes what no optimizer can; None: never, so nobody calls the next two."""
        return None

    def look(self, x: Tensor, grad: Tensor, ranks: Ranks) -> None:
        """See a batch of training on which ``adapt`` is to rest, after the update of its step. Collective.

        Args:
            x: (B, sum of field dims) this rank's input.
            grad: the same shape, the gradient of this rank's loss for it.
            ranks: joins what the ranks have.
        """

    def adapt(self, step: int, states: States, ranks: Ranks) -> None:
        """Change, in place, what no optimizer can, after the update of a step. Collective.

        Args:
            step: from 1.
            states: gives a parameter's optimizer state, name -> tensor, to be changed in place.
            ranks: joins what the ranks have.
        """

    def forget_looks(self) -> None:
        """Let the next ``adapt`` rest on no batch seen so far: a run that is warm-started has seen none."""

    def following_config(self) -> Any:
        """Return the config to train after this one, of an over-arch whose training is a search; None for others."""
        return None

    @property
    def flops_per_sample(self) -> int:
        """Return FLOPs of one forward pass for ONE sample; see ``Flops`` for what is counted."""
        return self.flops().total

    @property
    def num_parameters(self) -> int:
        """Return trainable parameters of the backbone: no embedding tables, no heads (paper 4.1.2)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _check_width(over_arch: OverArch, inputs: tuple[Tensor, ...]) -> None:
    """Refuse x of another width, of which a gather or a slice would use a part without a word."""
    width = inputs[0].shape[-1]
    if width != over_arch.in_features:
        raise UserError(
            f"x is {width} wide, {type(over_arch).__name__} was built for {over_arch.in_features}, "
            f"{len(over_arch.field_dims)} fields of dims {', '.join(map(str, sorted(set(over_arch.field_dims))))}"
        )


def equal_dim(over_arch: OverArch, name: str) -> int:
    """Return D of an over-arch whose fields must have equal dims.

    Raises:
        UserError: they differ; ``name`` is who asks.
    """
    dims = set(over_arch.field_dims)
    if len(dims) > 1:
        raise UserError(
            f"{name} needs fields of equal dims, these have {', '.join(map(str, sorted(dims)))}: remove embeddings.dims"
        )
    return over_arch.field_dims[0]


def _field_dims(num_fields: int, embedding_dim: int | Sequence[int]) -> tuple[int, ...]:
    if num_fields < 1:
        raise UserError(f"num_fields={num_fields}: an over-arch needs at least one field")
    dims = (embedding_dim,) * num_fields if isinstance(embedding_dim, int) else tuple(embedding_dim)
    if len(dims) != num_fields:
        raise UserError(f"embedding_dim has {len(dims)} dims for num_fields={num_fields}: give one per field")
    if min(dims) < 1:
        raise UserError(f"embedding_dim={embedding_dim}: every field needs at least one dim")
    return dims
