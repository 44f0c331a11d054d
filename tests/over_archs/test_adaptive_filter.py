"""How the dims of SSR-A's views move: against plain loops, and what is kept of a view."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssr_rec.over_archs.adaptive import forget, moved, rises, signals
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig
from tests.small_ssr import STATIC, D, F, batch, build

ADAPTIVE: dict[str, Any] = {"filter": "adaptive", "adapt_every": 10, "adapt_until": 40}
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


@pytest.mark.parametrize("switches", [{}, EVERY_SWITCH], ids=["plain", "switched"])
def test_a_rise_is_made_of_the_gradients_of_gates_that_stand_at_one(switches: dict[str, Any]) -> None:
    """Row by row and field by field, of a model with gates before its fields; fields of unequal dims."""
    torch.manual_seed(0)
    dims = [4, 2, 8, 6]
    ssr = SSR(len(dims), dims, 1, SSRConfig(**(STATIC | switches))).double().eval()
    x = torch.randn(9, sum(dims), dtype=torch.float64)
    gates = torch.ones(9, len(dims), dtype=torch.float64, requires_grad=True)
    wide = torch.cat([gates[:, [f]].expand(9, dim) for f, dim in enumerate(dims)], 1)
    gated = (x * wide).detach().requires_grad_()
    (of_x,) = torch.autograd.grad(ssr(gated).sin().sum(1).mean(), gated)
    ssr(x * wide).sin().sum().backward()
    wanted = []
    for f in range(len(dims)):
        of_rows = [row[f] for row in gates.grad.tolist()]
        wanted.append(sum(u * u for u in of_rows) / 9 / 2 - sum(of_rows) / 9)
    torch.testing.assert_close(rises(x, of_x, dims), torch.tensor(wanted), rtol=1e-4, atol=1e-6)


def test_a_rise_is_what_leaving_a_field_out_costs() -> None:
    """Of four numbers in a logit: one the labels follow, one they follow by half, one half as large, and one noise."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(400_000, 4, generator=generator)
    truth = x[:, 0] + 0.5 * x[:, 1] + 2 * x[:, 2]
    labels = torch.bernoulli(truth.sigmoid(), generator=generator)

    def loss(rows: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(rows.sum(1), labels)

    inputs = x.clone().requires_grad_()
    loss(inputs).backward()
    found = rises(x, inputs.grad, [1, 1, 1, 1])
    for field, rise in enumerate(found):
        without = x.clone()
        without[:, field] = 0
        torch.testing.assert_close(rise, loss(without) - loss(x), rtol=0.1, atol=5e-4)
    assert found[0] > 0.008 and abs(found[1]) < 1e-3 and found[2] > 0.02 and found[3] < -0.008


def test_a_signal_is_the_mean_in_standard_errors() -> None:
    """Of 10,000 batches without a signal it is between -4 and 4; of a mean of .1 near 10; of a field nobody sees 0."""
    draws = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    columns = torch.stack([draws, draws + 0.1, draws - 0.1, torch.zeros(10_000)], 1)
    found = signals(torch.stack([columns.sum(0), columns.square().sum(0)])).tolist()
    assert abs(found[0]) < 4 and found[3] == 0
    for value, mean in zip(found[1:3], (0.1, -0.1), strict=True):
        assert value == pytest.approx(found[0] + 100 * mean, abs=0.3)


def loop_moved(indices: list[list[int]], signal: list[float], closed: list[bool], seed: int) -> list[list[int]]:
    """What ``moved`` says, one exchange after another."""
    views, generator = [list(view) for view in indices], torch.Generator().manual_seed(seed)
    for view in views:
        goes = sorted((p for p, j in enumerate(view) if closed[j]), key=lambda p: signal[view[p]])
        outside = [j for j, shut in enumerate(closed) if not shut and j not in view]
        lots = torch.rand(len(outside), generator=generator, dtype=torch.float64).tolist()
        holders = {j: sum(j in other for other in views) for j in outside}
        comes = sorted(range(len(outside)), key=lambda k: holders[outside[k]] + lots[k])
        for place, k in zip(goes, comes, strict=False):
            view[place] = outside[k]
    return views


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize(("views", "dim", "width"), [(3, 8, 20), (4, 5, 9), (1, 3, 7), (2, 6, 7)])
def test_moves_as_plain_loops_do(views: int, dim: int, width: int, share: float) -> None:
    generator = torch.Generator().manual_seed(views + width)
    indices = torch.stack([torch.randperm(width, generator=generator)[:dim] for _ in range(views)])
    signal = torch.randint(-4, 5, (width,), generator=generator).float()  # with ties
    closed = torch.rand(width, generator=generator) < share
    found = moved(indices, signal, closed, torch.Generator().manual_seed(3))
    assert found.tolist() == loop_moved(indices.tolist(), signal.tolist(), closed.tolist(), 3)
    assert all(len(set(view)) == dim for view in found.tolist())
    for before, after in zip(indices, found, strict=True):
        stay_outside = int((~closed).sum()) - int((~closed[before]).sum())
        assert (before != after).sum() == min(int(closed[before].sum()), stay_outside)


def test_what_comes_is_what_the_fewest_views_hold() -> None:
    """Four views give up three dims each, and the twelve that nobody holds come, each once."""
    indices, closed = torch.arange(6).repeat(4, 1), torch.arange(18) < 3
    found = moved(indices, torch.zeros(18), closed, torch.Generator().manual_seed(0))
    assert sorted(found[:, :3].flatten().tolist()) == [*range(6, 18)]
    assert torch.equal(found[:, 3:], indices[:, 3:])


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


def looked_at(ssr: SSR, x: Tensor, low: int) -> SSR:
    """It has seen x as many batches, and gradients by which one field would better be left out, and no other."""
    for rows in x.detach().split(1):
        grad = -0.1 * rows
        grad[:, low * D : (low + 1) * D] *= -1
        ssr.look(rows, grad, OneRank())
    return ssr


def test_dims_of_a_field_that_costs_more_than_it_gives_go_by_all_batches() -> None:
    """A field stays closed when nothing is known of it any more; what is known of the others is kept."""
    x = batch(rows=20)
    ssr = looked_at(build(**ADAPTIVE).train(), x, low=1)
    slopes = -0.1 * x.square().unflatten(1, (F, D)).sum(2).float()
    slopes[:, 1] *= -1
    found = slopes.square() / 2 - slopes
    sums = torch.stack([found.sum(0), found.square().sum(0)])
    torch.testing.assert_close(ssr.gates[:2].float(), sums)
    dims = ssr.blocks()[0].filter
    before = dims.indices.clone()
    ssr.adapt(2, no_state, OneRank())
    gone = (before >= D) & (before < 2 * D)
    assert gone.any() and torch.equal(dims.indices != before, gone)
    assert not ssr.blocks()[0].fusion.dense.weight[gone].any()
    torch.testing.assert_close(ssr.gates[:2].float(), sums)
    assert ssr.gates[2].tolist() == [0, 1, 0, 0, 0]
    for _ in range(6):
        looked_at(ssr, x, low=3)
    ssr.adapt(4, no_state, OneRank())
    assert ssr.gates[2].tolist() == [0, 1, 0, 1, 0]
    assert ssr.statistics(x, list("abcde"))["filters"]["closed_fields"] == ["b", "d"]
    assert not {*range(D, 2 * D), *range(3 * D, 4 * D)} & set(dims.indices.flatten().tolist())


def test_rows_of_one_batch_are_one_observation() -> None:
    """However many rows say it in one batch, it is no more than one standard error."""
    ssr, x = build(**ADAPTIVE, adapt_threshold=1.01).train(), batch(rows=20)
    ssr.look(x, x / 100, OneRank())
    ssr.adapt(2, no_state, OneRank())
    assert (ssr.gates[0] < 0).all() and not ssr.gates[2].any()


def test_a_batch_that_is_not_finite_says_nothing() -> None:
    ssr = looked_at(build(**ADAPTIVE).train(), batch(rows=20), low=1)
    before = ssr.gates.clone()
    ssr.look(batch(), torch.full((6, F * D), float("nan"), dtype=torch.float64), OneRank())
    assert torch.equal(ssr.gates, before) and before.any()


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
    forward(x)
    looked_at(ssr, x, low=1).adapt(2, no_state, OneRank())
    first, second = (layer.filter.indices for layer in ssr.blocks())
    share = (first != start["layers.0.filter.indices"]).double().mean().item()
    assert share > 0
    assert torch.equal(second, start["layers.1.filter.indices"])
    with torch.no_grad():  # those of new dims are zero, and would hide which dims they are of
        ssr.blocks()[0].fusion.dense.weight.normal_()
    static = build(filter="static").float().eval()
    unused = static.load_state_dict(ssr.state_dict(), strict=False).unexpected_keys
    assert unused == ["gates"]
    torch.testing.assert_close(forward(x), static(x))
    before = x.clone().requires_grad_()
    forward(before).square().sum().backward()
    assert set(before.grad.abs().sum(0).nonzero().flatten().tolist()) == set(first.unique().tolist())
    assert ssr.blocks()[0].filter.statistics(x)["moved"] == pytest.approx(share)


def test_views_of_the_whole_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no dims to move: each view sees all 20.*set view_dim to less"):
        SSR(F, D, 1, SSRConfig(filter="adaptive", view_dim=F * D, num_views=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "static", "adapt_threshold": 3.0}, r"adapt_threshold=3\.0 has no effect.*filter='adaptive'"),
        ({"filter": "dynamic", "adapt_every": 7}, r"adapt_every=7 has no effect.*filter='adaptive'"),
        ({"filter": "adaptive", "input_norm": "per_dim"}, r"input_norm='per_dim' hides from filter='adaptive'"),
        ({"filter": "adaptive", "input_norm": "per_field"}, r"input_norm='per_field' hides from filter='adaptive'"),
        ({"filter": "adaptive", "adapt_every": 155, "adapt_until": 309}, r"adapt_every=155.*half of adapt_until=309"),
        (
            {"filter": "adaptive", "adapt_every": 5, "adapt_until": 14, "adapt_threshold": 3},
            r"adapt_until=14 leaves 9 batches.*never more than 3\.0.*adapt_threshold=3",
        ),
    ],
)
def test_settings_that_would_move_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSRConfig(**settings)


def test_configs_of_other_filters_say_nothing_of_adapting() -> None:
    """Whatever its defaults become, a config that a run has left stays right; also one that versions before wrote."""
    ours = SSRConfig(filter="static", index_seed=4)
    written = ours.model_dump(mode="json")
    assert written["index_seed"] == 4 and not [key for key in written if key.startswith("adapt_") or key == "top_k"]
    assert SSRConfig.model_validate(written) == ours
    before = {"adapt_every": 100, "adapt_until": 300, "adapt_batches": 20, "adapt_share": 0.1, "adapt_spread": 1.0}
    for older in (before, {"adapt_every": 100, "adapt_until": 500, "adapt_threshold": 2.0}):
        assert SSRConfig.model_validate(written | older) == ours
        with pytest.raises(ValueError, match="adapt_every=101 has no effect"):
            SSRConfig.model_validate(written | older | {"adapt_every": 101})
    adaptive = SSRConfig(filter="adaptive", adapt_every=7).model_dump(mode="json")
    assert adaptive["adapt_every"] == 7 and adaptive["adapt_until"] == 500 and "filter_dim" not in adaptive
    with pytest.raises(ValueError, match="adapt_batches"):
        SSRConfig.model_validate({**adaptive, "adapt_batches": 20})
