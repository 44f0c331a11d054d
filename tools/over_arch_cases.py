"""Defines what bench_over_arch.py times: over-archs and single operators as steps, and what is measured of a step.

A step's figures, beside its time:

- arithmetic: FLOPs as ``OverArch.flops`` counts them; forward and backward together are three times the forward,
  since every product of the forward has two of its size in the backward. What else a backward does is not counted.
- least bytes: forward, every input, weight and output once; the backward reads inputs, weights and the gradient of the
  output once more and writes the gradients of inputs and weights. Index buffers and what a cache keeps are left out.
- bytes moved: what the step's operators read and write one by one, views free, each argument and result once per
  operator: the traffic to memory of operators that share no cache. Unknown for what ``torch.compile`` fuses, and blind
  to what an operator of ours does inside.
- saved bytes: storages kept for the backward, inputs among them; parameters and buffers, there anyway, left out.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from step_bytes import size_of
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ssr_rec.kernels import ics
from ssr_rec.kernels.reference import ics_reference, view_fusion_reference
from ssr_rec.over_archs.base import OverArch
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.filters import IcsFilter
from ssr_rec.over_archs.registry import build_over_arch
from ssr_rec.over_archs.ssr import SSRLayer
from ssr_rec.over_archs.ssr_settings import SSRConfig


@dataclass(frozen=True)
class Setting:
    """Says where and how all steps of one run are computed."""

    device: torch.device
    bf16: bool
    compile: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which ``model.DenseArch`` runs its over-arch."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


@dataclass(frozen=True)
class Case:
    """Describes one thing to time.

    Attributes:
        step: does it once.
        flops: arithmetic of one step; 0 where nobody asks for it.
        least_bytes: the module's docstring says what counts.
        resident: tensors that saved bytes leave out.
        fused: the step is compiled, so that its bytes cannot be counted.
    """

    name: str
    step: Callable[[], object]
    flops: int
    least_bytes: int
    resident: tuple[Tensor, ...] = ()
    fused: bool = False


def over_arch_case(config: OverArchConfig, fields: int, dim: int, batch: int, train: bool, setting: Setting) -> Case:
    """Return one step of an over-arch on a random batch: forward in eval mode, or forward and backward.

    Raises:
        ValueError: the config does not fit the fields, or these sizes.
    """
    over_arch = build(config, fields, dim).to(setting.device).train(train)
    widths = [over_arch.in_features, *map(sum, over_arch.extra_tables.values())]
    inputs = tuple(torch.randn(batch, width, device=setting.device, requires_grad=train) for width in widths)
    weights = [p for p in over_arch.parameters() if p.requires_grad]
    fused = setting.compile or config.compile
    forward = torch.compile(over_arch, fullgraph=True, dynamic=False) if fused else over_arch
    return Case(
        name=config.label,
        step=make_step(lambda: forward(*inputs), [*inputs, *weights], train, setting),
        flops=over_arch.flops_per_sample * batch * (3 if train else 1),
        least_bytes=least_bytes(lambda: over_arch(*inputs), inputs, weights, train, setting),
        resident=(*over_arch.parameters(), *over_arch.buffers()),
        fused=fused,
    )


def build(config: OverArchConfig, fields: int, dim: int) -> OverArch:
    """Return the over-arch for one task, with the same weights every time."""
    torch.manual_seed(0)
    return build_over_arch(fields, dim, 1, config)


def make_step(
    forward: Callable[[], Any], wanted: Sequence[Tensor], train: bool, setting: Setting
) -> Callable[[], object]:
    """Return ``forward`` under autocast; with ``train`` the gradients of ``wanted`` too, not accumulated."""
    upstream: list[Tensor] = []

    def outputs() -> list[Tensor]:
        with setting.autocast():
            return tree_leaves(forward())

    def both() -> object:
        y = outputs()
        if not upstream:
            # The same for every form of an operator.
            same = torch.Generator(setting.device).manual_seed(0)
            like = {"device": setting.device, "dtype": y[0].dtype}
            upstream.extend(torch.randn(part.shape, generator=same, **like) for part in y)
        return torch.autograd.grad(y, wanted, upstream)

    return both if train else torch.no_grad()(outputs)


def least_bytes(
    forward: Callable[[], Any], inputs: Sequence[Tensor], weights: Sequence[Tensor], train: bool, setting: Setting
) -> int:
    """Return bytes that one step cannot do without, by the rule above."""
    with torch.no_grad(), setting.autocast():
        outputs = tree_leaves(forward())
    operands = size_of([*inputs, *weights])
    return 3 * operands + 2 * size_of(outputs) if train else operands + size_of(outputs)


def operator_cases(batch: int, views: int, dim: int, iterations: int, setting: Setting) -> list[Case]:
    """Return ICS on (batch, views, dim) beside ReLU and a copy of the same tensor; SSR layers beside their GEMMs alone.

    A layer's input is as wide as its output, as from the second layer of a stack on. A name has ``fwd`` or ``fwd+bwd``,
    then the form: none, ours; ``plain``, torch's own operators; ``plain compiled``, with ``compile`` alone; ``GEMMs``,
    with the two products of each for the backward. In bf16, z and the GEMMs' operands are bfloat16, a layer's input and
    weights and the parameters of ICS float32, as autocast has them.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    z = torch.randn(batch, views, dim, device=setting.device, dtype=dtype)
    target = torch.empty_like(z)
    cases = [
        Case("relu fwd", lambda: torch.relu(z), 0, 2 * size_of([z])),
        Case("copy", lambda: target.copy_(z), 0, 2 * size_of([z])),
    ]
    alpha = torch.full((views, iterations), 0.1, device=setting.device, requires_grad=True)
    gamma = torch.ones(views, dim, device=setting.device, requires_grad=True)
    for train in (False, True):
        leaf = z.detach().requires_grad_(train)
        cases += _forms(f"ICS {_way(train)}", ics, ics_reference, Given([leaf], [alpha, gamma]), 0, train, setting)
    for kind, train in product(("static", "dynamic"), (False, True)):
        config = SSRConfig.model_validate(
            {"filter": kind, "num_views": views, "view_dim": dim}
            | ({"iterations": iterations} if kind == "dynamic" else {})
        )
        torch.manual_seed(0)
        layer = SSRLayer(views * dim, 1, config).to(setting.device).train(train)
        x = torch.randn(batch, views * dim, device=setting.device, requires_grad=train)
        name, flops = f"{config.label.split()[0]} layer {_way(train)}", layer.flops()
        steps = batch * (3 if train else 1)
        cases += _forms(name, layer, plain_layer, Given([x], [], layer), steps * flops.total, train, setting)
        cases.append(_gemms(name, kind == "dynamic", train, (batch, views, dim), steps * flops.matmul, dtype, setting))
    return cases


def plain_layer(x: Tensor, layer: SSRLayer) -> Tensor:
    """Return an SSR layer of torch's own operators alone: (B, width) -> (B, V, d)."""
    indices = None
    if isinstance(layer.filter, IcsFilter):
        z = layer.filter.proj(x).unflatten(1, (layer.filter.num_views, layer.filter.view_dim))
        x = ics_reference(z, layer.filter.alpha, layer.filter.gamma)
    else:
        indices = layer.filter.indices
    dense, norm = layer.fusion.dense, layer.fusion.norm
    return view_fusion_reference(x, indices, dense.weight, dense.bias, None, norm.weight, norm.bias, norm.eps)


class Given(NamedTuple):
    """Holds what a case computes with; of a layer, its plain form is given the layer in place of parameters."""

    inputs: list[Tensor]
    parameters: list[Tensor]
    layer: SSRLayer | None = None


def _forms(
    name: str,
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    given: Given,
    flops: int,
    train: bool,
    setting: Setting,
) -> list[Case]:
    """Ours, plain and, with ``compile``, plain compiled; the plain form of a layer is given the layer."""
    inputs, parameters, layer = given
    weights = parameters if layer is None else list(layer.parameters())
    own, theirs = [*inputs, *parameters], [*inputs, *(parameters if layer is None else [layer])]
    least = least_bytes(lambda: plain(*theirs), inputs, weights, train, setting)
    resident = (*weights, *(() if layer is None else layer.buffers()))
    forms = [(name, ours, own, setting.compile), (f"{name}, plain", plain, theirs, False)]
    if setting.compile:
        forms.append((f"{name}, plain compiled", plain, theirs, True))
    cases = []
    for form, function, arguments, compiled in forms:
        forward = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        step = make_step(functools.partial(forward, *arguments), [*inputs, *weights], train, setting)
        cases.append(Case(form, step, flops, least, resident, compiled))
    return cases


def _gemms(
    name: str,
    projected: bool,
    train: bool,
    sizes: tuple[int, int, int],
    flops: int,
    dtype: torch.dtype,
    setting: Setting,
) -> Case:
    """Return the matrix products of a layer alone, in the layouts that they have in the plain layer.

    Args:
        sizes: batch, views, dim.
    """
    batch, views, dim = sizes
    like: Any = {"device": setting.device, "dtype": dtype}
    pairs = [(torch.randn(views, batch, dim, **like), torch.randn(views, dim, dim, **like))]
    if projected:
        wide = views * dim
        pairs.append((torch.randn(batch, wide, **like), torch.randn(wide, wide, **like).t()))
    grads = [a @ w for a, w in pairs]

    def step() -> None:
        for (a, w), g in zip(pairs, grads, strict=True):
            torch.matmul(a, w)
            if train:
                torch.matmul(g, w.mT)
                torch.matmul(a.mT, g)

    operands = size_of(tensor for pair in pairs for tensor in pair)
    least = 3 * operands + 2 * size_of(grads) if train else operands + size_of(grads)
    return Case(f"{name}: GEMMs", step, flops, least)


def _way(train: bool) -> str:
    return "fwd+bwd" if train else "fwd"


def interleave(
    cases: Sequence[Case], repetitions: int, warmup: int, device: torch.device, warm: bool = False
) -> list[list[float]]:
    """Return seconds of each repetition of each case.

    The cases take turns, so that a drift of the machine meets all of them, each turn in another order: what runs
    after a large case finds its data gone from the caches. With ``warm``, each is run once more before it is timed.
    """
    order = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(warmup + repetitions):
        for index in order.permutation(len(cases)):
            if warm:
                cases[index].step()
            elapsed = _seconds(cases[index].step, device)
            if turn >= warmup:
                seconds[index].append(elapsed)
    return seconds


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
