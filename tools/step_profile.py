"""Says where a training step goes: the time of its operators, sorted by what they are for, on one rank."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from ssr_rec.over_archs.base import OverArch

KINDS: tuple[tuple[str, str], ...] = (
    # The first that matches an operator or one that called it, from the inside out.
    ("optimizer", r"^Optimizer\.|^optimizer|_fused_adam|_foreach_"),
    ("fused update", r"embedding_bag.*backward|split_embedding.*(backward|adagrad|sgd)|SplitLookup.*Backward"),
    ("lookups", r"split_embedding|embedding_bag|bounds_check|block_bucketize|expand_into_jagged"),
    ("products", r"^aten::(addmm|mm|bmm|baddbmm|matmul|linear|mkldnn_linear)|^mkl::|brgemm"),
    ("filter and fuse", r"ssr_rec::|ViewFusion|ICS|Ics"),
    ("loss and metrics", r"binary_cross_entropy|sigmoid|sort|searchsorted"),
    ("collectives", r"^c10d|^gloo|all2all|all_?reduce"),
    ("ids and batches", r"KeyedJagged|jagged|permute_|cumsum|lengths|input_dist|pin_memory|to_copy.*int"),
)
"""Kind -> names of operators; one that matches none is element by element: activations, norms, copies, sums."""
ELEMENTWISE, OUTSIDE = "elementwise", "Python and waiting"
"""The second is what no operator of the training thread does; the reader has a thread of its own."""
BACKWARD = "autograd::engine::evaluate_function"


def kind_of(event: FunctionEvent) -> str:
    """Return what an operator is for: by its own name, else by the names of those that called it."""
    for name in names_outwards(event):
        for kind, names in KINDS:
            if re.search(names, name):
                return kind
    # Spans that Python opened round other operators, such as a module's forward, have no namespace.
    return ELEMENTWISE if "::" in event.name and not event.name.startswith(BACKWARD) else OUTSIDE


def is_backward(event: FunctionEvent) -> bool:
    return any(name.startswith(BACKWARD) for name in names_outwards(event))


def names_outwards(event: FunctionEvent) -> Iterator[str]:
    """Yield the name of an operator, then of the one that called it, and so on."""
    at: FunctionEvent | None = event
    while at is not None:
        yield at.name
        at = at.cpu_parent


def profile_steps(job: Callable[[int], None], steps: int) -> dict[str, Any]:
    """Return the microseconds of a step by kind: ``forward`` and ``backward`` of each, and ``step`` in all.

    The steps are timed once without and once with the profiler, which makes each operator some microseconds slower;
    what is given are the shares under the profiler of the time without it.

    Args:
        job: trains so many further steps.
        steps: how many to look at.
    """
    job(steps)
    begun = time.perf_counter()
    job(steps)
    plain = (time.perf_counter() - begun) / steps * 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        job(steps)
        slowed = (time.perf_counter() - begun) / steps * 1e6
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events() or []:
        sums[kind_of(event)][is_backward(event)] += event.self_cpu_time_total / steps
    inside = sum(map(sum, sums.values()))
    sums[OUTSIDE][0] += max(0.0, slowed - inside)
    scale = plain / max(slowed, inside)
    kinds = {kind: {"forward": f * scale, "backward": b * scale} for kind, (f, b) in sums.items()}
    return {"step": plain, "slowed": slowed, "kinds": kinds}


def product_rate(rows: int, width: int, repetitions: int = 50) -> float:
    """Return the floating-point operations a second of a float32 product of (rows, width) by (width, width) here."""
    a, b = torch.ones(rows, width), torch.ones(width, width)
    taken = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        torch.mm(a, b)
        taken.append(time.perf_counter() - begun)
    return 2 * rows * width * width / sorted(taken)[repetitions // 2]


def product_microseconds(over_arch: OverArch, rows: int, rate: float) -> float:
    """Return how long the over-arch's products of a step would take alone, at ``rate``: three times the forward's."""
    return 3 * over_arch.flops().matmul * rows / rate * 1e6


def profile_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: a line a kind, with microseconds and percent of each over-arch's step."""
    names = list(found)
    order = [kind for kind, _ in KINDS] + [ELEMENTWISE, OUTSIDE]
    lines = [f"| us of a step, forward + backward, % | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for kind in order:
        cells = []
        for one in found.values():
            part = one["kinds"].get(kind, {"forward": 0.0, "backward": 0.0})
            both = part["forward"] + part["backward"]
            cells.append(f"{part['forward']:,.0f} + {part['backward']:,.0f}, {both / one['step']:.0%}" if both else "-")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    steps = [f"{one['step']:,.0f}" for one in found.values()]
    lines.append(f"| step | {' | '.join(steps)} |")
    alone = [f"{one['step'] / one['products_alone']:.2f}" for one in found.values()]
    lines.append(f"| step over its products alone | {' | '.join(alone)} |")
    return "\n".join(lines)
