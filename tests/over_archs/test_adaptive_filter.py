"""How the dims of SSR-A's views move: against plain loops, and what is kept of a view."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssr_rec.over_archs.adaptive import count_at, first_products, forget, moved
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig
from tests.small_ssr import D, F, batch, build

ADAPTIVE: dict[str, Any] = {
    "filter": "adaptive",
    "adapt_every": 2,
    "adapt_until": 8,
    "adapt_batches": 2,
    "adapt_share": 0.5,
}
EVERY_SWITCH = {
    "residual": True,
    "fusion_layers": 2,
    "input_norm": "per_dim",
    "output": "mean",
    "output_mlp": [6],
    "input_dropout": 0.3,
    "fusion_dropout": 0.3,
}


class OneRank:
    """Joins nothing."""

    def add(self, tensor: Tensor) -> None: ...
    def take_first(self, tensor: Tensor) -> None: ...


def no_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {}


def loop_gradient(ssr: SSR, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the first layer's weights if each view saw every dim: (V, width, d), dim by dim and unit by unit.

    Each view's product is written as a sum over all dims of the input, with a weight of zero for those it does not see.
    """
    first, views, dim = ssr.blocks()[0], ssr.config.num_views, ssr.config.view_dim
    width = x.shape[1]
    weights = [[[torch.zeros((), dtype=x.dtype) for _ in range(dim)] for _ in range(width)] for _ in range(views)]
    for v in range(views):
        for place, j in enumerate(first.filter.indices[v].tolist()):
            for k in range(dim):
                weights[v][j][k] = first.fusion.dense.weight[v, place, k].detach().clone()
    leaves = [w.requires_grad_() for view in weights for row in view for w in row]
    rows = []
    for v in range(views):
        units = []
        for k in range(dim):
            z = first.fusion.dense.bias[v, k].detach()
            for j in range(width):
                z = z + x[:, j] * weights[v][j][k]
            units.append(0.5 * z * (1 + torch.erf(z / math.sqrt(2))))
        z = torch.stack(units, 1)
        centred = z - z.mean(1, keepdim=True)
        z = centred / (centred.square().mean(1, keepdim=True) + first.fusion.norm.eps).sqrt()
        rows.append(z * first.fusion.norm.weight[v] + first.fusion.norm.bias[v])
    features = ssr.layers[1](torch.cat(rows, 1)).flatten(1)
    found = torch.autograd.grad(features, leaves, grad)
    return torch.stack(found).view(views, width, dim)


def test_the_would_be_gradient_is_that_of_views_that_see_all_dims() -> None:
    ssr, x = build(**ADAPTIVE, num_views=2, view_dim=4).train(), batch()
    grad = torch.randn(ssr(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    seen, of_product = first_products(ssr, x, grad)
    would_be = torch.einsum("bw,vbd->vwd", seen, of_product)
    torch.testing.assert_close(would_be, loop_gradient(ssr, x, grad))


@pytest.mark.parametrize("switches", [{}, EVERY_SWITCH], ids=["plain", "switched"])
def test_of_dims_that_a_view_sees_it_is_their_gradient_and_the_model_stays_as_it_was(switches: dict[str, Any]) -> None:
    ssr, x = build(**ADAPTIVE, **switches).train(), batch()
    before, seed = copy.deepcopy(ssr.state_dict()), torch.get_rng_state()
    grad = torch.randn(len(x), ssr.out_features, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    seen, of_product = first_products(ssr, x, grad)
    would_be = torch.einsum("bw,vbd->vwd", seen, of_product)
    assert torch.equal(seed, torch.get_rng_state()) and all(m.training for m in ssr.modules())
    assert all(torch.equal(value, before[name]) for name, value in ssr.state_dict().items())
    # Dropout off; batch norm still takes the batch's figures.
    ssr.input_dropout.p = 0.0
    for layer in ssr.blocks():
        layer.fusion.dropout.p = 0.0
    ssr(x).backward(grad)
    first = ssr.blocks()[0]
    for v, dims in enumerate(first.filter.indices.tolist()):
        torch.testing.assert_close(would_be[v, dims], first.fusion.dense.weight.grad[v])


def loop_moved(
    indices: list[list[int]], use: list[list[float]], gain: list[list[float]], count: int, spread: float, first: int
) -> list[list[int]]:
    """What ``moved`` says, one exchange after another."""
    views = [list(view) for view in indices]
    for turn in range(len(views)):
        v = (first + turn) % len(views)
        holders = [sum(j in view for view in views) for j in range(len(gain[v]))]
        order = sorted(range(len(views[v])), key=lambda place: use[v][place])
        outside = [j for j in range(len(gain[v])) if j not in views[v]]
        best = sorted(outside, key=lambda j: -gain[v][j] / (1 + spread * holders[j]))
        for place, j in zip(order[:count], best[:count], strict=True):
            views[v][place] = j
    return views


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
@pytest.mark.parametrize(("views", "dim", "width", "count"), [(3, 8, 20, 3), (4, 5, 9, 4), (1, 3, 7, 0), (2, 6, 12, 6)])
def test_moves_as_plain_loops_do(views: int, dim: int, width: int, count: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(views + width)
    indices = torch.stack([torch.randperm(width, generator=generator)[:dim] for _ in range(views)])
    use = torch.randint(0, 4, (views, dim), generator=generator).double()  # with ties
    gain = torch.randint(0, 6, (views, width), generator=generator).double()
    for first in range(views):
        found = moved(indices, use, gain, count, spread, first)
        assert found.tolist() == loop_moved(indices.tolist(), use.tolist(), gain.tolist(), count, spread, first)
        assert all(len(set(view)) == dim for view in found.tolist())
        assert ((found != indices).sum(1) == count).all()


def test_spread_makes_views_take_different_dims() -> None:
    indices, use = torch.arange(3).repeat(4, 1), torch.zeros(4, 3)
    gain = torch.tensor([0.0, 0, 0, 10, 9, 8, 7, 6, 5, 4, 3, 2]).repeat(4, 1)
    alike, apart = (moved(indices, use, gain, 3, spread, 0) for spread in (0.0, 9.0))
    assert alike.unique().tolist() == [3, 4, 5]
    assert apart.unique().tolist() == [*range(3, 12)]


def test_the_share_falls_to_none() -> None:
    settings = {"adapt_every": 10, "adapt_until": 40, "adapt_batches": 1}
    config = SSRConfig(filter="adaptive", **settings, adapt_share=0.5, view_dim=16)
    assert [count_at(step, config) for step in (10, 20, 30, 40, 50, 90)] == [8, 6, 4, 2, 0, 0]


def test_exchanged_rows_begin_anew_and_others_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 4, generator=generator)
    states = {name: torch.rand(2, 3, 4, generator=generator) + 1 for name in ("exp_avg", "exp_avg_sq", "average")}
    states["step"] = torch.tensor(7.0)
    before = {name: value.clone() for name, value in {**states, "weight": weight}.items()}
    changed = torch.tensor([[True, False, False], [False, False, False]])
    forget(weight, states, changed)
    for name, value in {**states, "weight": weight}.items():
        if name != "step":
            assert torch.equal(value[~changed], before[name][~changed]), name
            wanted = before[name][0, 1:].mean(0) if name == "exp_avg_sq" else torch.zeros(4)
            torch.testing.assert_close(value[0, 0], wanted)
    assert states["step"] == 7


def test_what_comes_has_the_largest_gradient_for_its_size_over_all_batches() -> None:
    """Two batches count as one of all their rows; small dims are not put back for being small."""
    whole, parts = build(**ADAPTIVE, adapt_spread=0.0).train(), build(**ADAPTIVE, adapt_spread=0.0).train()
    first = whole.blocks()[0]
    x, before = batch(rows=20) * torch.logspace(-2, 0, F * D, dtype=torch.float64), first.filter.indices.clone()
    grad = torch.randn(20, whole.out_features, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    whole.look(x, grad, OneRank())
    for rows in (slice(0, 7), slice(7, 20)):
        parts.look(x[rows], grad[rows], OneRank())
    seen, of_product = first_products(whole, x, grad)
    norms = torch.einsum("bw,vbd->vwd", seen, of_product).square().sum(2).sqrt()
    sizes = [sum(value * value for value in column) ** 0.5 for column in x.t().tolist()]
    gain = [[norm / size for norm, size in zip(row, sizes, strict=True)] for row in norms.tolist()]
    use = [[math.hypot(*row) for row in view] for view in first.fusion.dense.weight.tolist()]
    for ssr in (whole, parts):
        ssr.adapt(2, no_state, OneRank())
        found = ssr.blocks()[0].filter
        assert found.indices.tolist() == loop_moved(before.tolist(), use, gain, 4, 0.0, 1)
        assert not found.would_be.any() and not found.squares.any()


def test_nothing_moves_where_no_batch_was_seen() -> None:
    ssr = build(**ADAPTIVE)
    before = copy.deepcopy(ssr.state_dict())
    ssr.adapt(2, no_state, OneRank())
    assert all(torch.equal(value, before[name]) for name, value in ssr.state_dict().items())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_what_sees_the_views_sees_the_moved_dims(compiled: bool) -> None:
    """No form keeps dims that it saw before, and an SSR-S of the same weights is the same model."""
    ssr, x = build(**ADAPTIVE).float().train(), batch(rows=40).float()
    start = {name: value.clone() for name, value in ssr.state_dict().items()}
    forward = torch.compile(ssr.forward, backend="aot_eager", dynamic=True) if compiled else ssr.forward
    features = forward(x)
    ssr.look(x, torch.randn_like(features), OneRank())
    ssr.adapt(2, no_state, OneRank())
    first, second = (layer.filter.indices for layer in ssr.blocks())
    assert ((first != start["layers.0.filter.indices"]).sum(1) == 4).all()
    assert torch.equal(second, start["layers.1.filter.indices"])
    with torch.no_grad():  # those of new dims are zero, and would hide which dims they are of
        ssr.blocks()[0].fusion.dense.weight.normal_()
    static = build(filter="static").float().eval()
    unused = static.load_state_dict(ssr.state_dict(), strict=False).unexpected_keys
    assert unused == ["layers.0.filter.would_be", "layers.0.filter.squares"]
    torch.testing.assert_close(forward(x), static(x))
    before = x.clone().requires_grad_()
    forward(before).square().sum().backward()
    assert set(before.grad.abs().sum(0).nonzero().flatten().tolist()) == set(first.unique().tolist())
    assert ssr.blocks()[0].filter.statistics(x)["moved"] == pytest.approx(0.5)


def test_views_of_the_whole_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no dims to move: each view sees all 20.*set view_dim to less"):
        SSR(F, D, 1, SSRConfig(filter="adaptive", view_dim=F * D, num_views=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "static", "adapt_share": 0.2}, r"adapt_share=0\.2 has no effect.*filter='adaptive'"),
        ({"filter": "adaptive", "adapt_every": 10, "adapt_batches": 11}, r"adapt_batches=11.*at most adapt_every=10"),
        ({"filter": "dynamic", "adapt_every": 7}, r"adapt_every=7 has no effect.*filter='adaptive'"),
        ({"filter": "adaptive", "adapt_every": 309, "adapt_until": 308}, r"adapt_every=309.*adapt_until=308"),
        ({"filter": "adaptive", "view_dim": 8, "adapt_share": 0.05}, r"adapt_share=0\.05 of view_dim=8"),
    ],
)
def test_settings_that_would_move_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSRConfig(**settings)
