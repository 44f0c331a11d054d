"""Checks that an over-arch of one's own keeps the contract on which training, export and reports rely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs.base import OverArch
from ssr_rec.over_archs.registry import build_over_arch
from ssr_rec.over_archs.settings import CustomOverArchConfig

ROWS, TASKS = 16, 2
DIMS = (4, 4, 4, 4, 4)
TOLERANCE = 1e-5


def check_over_arch(path: str, settings: Mapping[str, Any] | None = None, dims: tuple[int, ...] = DIMS) -> None:
    """Build the over-arch at ``MODULE:CLASS`` on random inputs and check what it must do.

    That is: the shape of its output, each row by itself, a finite gradient for every parameter, weights by the seed
    and from a state dict, batches of one row and of none, the matrix products that ``flops`` counts, and export. In a
    test of your own: ``check_over_arch("my_package.my_module:MyOverArch", {"hidden": 64})``.

    Args:
        settings: of the class.
        dims: of the fields.

    Raises:
        UserError: the class cannot be imported or built.
        AssertionError: it does not keep the contract; the message says which part.
    """
    config = CustomOverArchConfig(path=path, settings=dict(settings or {}))

    def made(seed: int) -> OverArch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_over_arch(len(dims), dims, TASKS, config)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = _inputs(made(0), ROWS)
        _check_rows(made(0).eval(), inputs)
        _check_gradients(made(0), inputs)
        _check_weights(made, inputs)
        _check_flops(made(0).eval(), inputs)
        torch.export.export(made(0).eval(), tuple(inputs))


def _inputs(over_arch: OverArch, rows: int) -> list[Tensor]:
    widths = [over_arch.in_features, *(sum(each) for each in over_arch.extra_tables.values())]
    return [torch.randn(rows, width) for width in widths]


def _parts(output: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _check_rows(over_arch: OverArch, inputs: list[Tensor]) -> None:
    together = _parts(over_arch(*inputs))
    for rows in (ROWS, 1, 0):
        features, *logits = _parts(over_arch(*(x[:rows] for x in inputs)))
        shapes = ((rows, over_arch.out_features), (rows, TASKS, over_arch.out_features))
        require(features.shape in shapes, f"forward of {rows} rows gives {tuple(features.shape)}, not one of {shapes}")
        for added in logits:
            require(added.shape == (rows, TASKS), f"its logits are {tuple(added.shape)}, not ({rows}, {TASKS})")
        for alone, all_of_them in zip((features, *logits), together, strict=True):
            require(bool(alone.isfinite().all()), "an output is not finite")
            # Of one row and of none: what a row gives must not depend on the others.
            worst = (alone - all_of_them[:rows]).abs().max().item() if rows else 0.0
            require(worst < TOLERANCE, f"in eval mode a row's output depends on the other rows, by {worst:.1e}")


def _check_gradients(over_arch: OverArch, inputs: list[Tensor]) -> None:
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = torch.stack([(part * torch.randn_like(part)).sum() for part in _parts(over_arch(*inputs))]).sum()
    loss.backward()
    for name, tensor in [*zip(("x", *over_arch.extra_tables), inputs, strict=True), *over_arch.named_parameters()]:
        if tensor.requires_grad:
            require_gradient(name, tensor)


def _check_weights(made: Any, inputs: list[Tensor]) -> None:
    first, again, other = made(1).eval(), made(1).eval(), made(2).eval()
    wanted = _parts(first(*inputs))
    for source in (again, first):
        same = all(map(torch.equal, _parts(source(*inputs)), wanted))
        require(same, "the same seed, weights and rows give another output in eval mode")
    other.load_state_dict(first.state_dict())
    same = all(map(torch.equal, _parts(other(*inputs)), wanted))
    require(same, "its state_dict does not hold all that its output depends on; register buffers")


def _check_flops(over_arch: OverArch, inputs: list[Tensor]) -> None:
    with FlopCounterMode(display=False) as counter:
        over_arch(*inputs)
    counted, said = counter.get_total_flops() / ROWS, over_arch.flops().matmul
    require(counted == said, f"flops() says {said} of matrix products for a sample, torch counts {counted:g}")


def require_gradient(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that has no gradient, or one that is not finite."""
    require(tensor.grad is not None, f"{name} gets no gradient, for which other ranks would wait")
    require(bool(tensor.grad.isfinite().all()), f"the gradient of {name} is not finite")  # type: ignore[union-attr]


def require(holds: bool, otherwise: str) -> None:
    """Say which part of a contract is broken, where it does not hold."""
    if not holds:
        raise AssertionError(otherwise)
