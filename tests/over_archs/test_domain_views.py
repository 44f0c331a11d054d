"""Layers and views of each domain, against plain loops over rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs.base import Domain
from ssr_rec.over_archs.domain_layers import BLOCK, DomainLinear, domain_rows
from ssr_rec.over_archs.domain_views import DomainViews
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig

N, WIDTH, V, D = 5, 20, 2, 6
SMALL: dict[str, Any] = {"num_views": 3, "view_dim": D, "domain_views": V}
CASES = {
    "static": {"filter": "static"},
    "static switched": {"filter": "static", "residual": True, "fusion_layers": 2, "output": "mean"},
    "dynamic": {"filter": "dynamic"},
    "dynamic switched": {"filter": "dynamic", "gate": True, "gamma": False, "filter_dim": 9, "learn_alpha": False},
    "adaptive": {"filter": "adaptive"},
}
every_case = pytest.mark.parametrize("case", CASES)


def randomised(module: Any) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) + 0.2)
    return module.double()


def built(case: str) -> SSR:
    return randomised(SSR(5, 4, 1, SSRConfig(**SMALL, **CASES[case]), Domain("tab", N)))


def drawn(rows: int, most: int = N) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True), torch.randint(0, most, (rows,))


def assert_same_gradients(module: nn.Module, x: Tensor, ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted)
    weights = [x, *(p for p in module.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(wanted)
    both = [
        torch.autograd.grad(y, weights, cotangent, allow_unused=True, materialize_grads=True) for y in (ours, wanted)
    ]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("rows", [1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("most", [1, N - 1], ids=["one domain", "most domains"])
def test_a_row_has_the_dense_layers_of_its_domain(rows: int, most: int) -> None:
    layer = randomised(DomainLinear(N, V, 4, 3))
    x, domain = drawn(rows, most)
    x = x[:, : V * 4].detach().unflatten(1, (V, 4)).requires_grad_()
    wanted = torch.stack(
        [torch.stack([x[r, g] @ layer.weight[d, g] + layer.bias[d, g] for g in range(V)]) for r, d in enumerate(domain)]
    )
    assert_same_gradients(layer, x, layer(x, domain_rows(domain, N)), wanted)
    layer(x, domain_rows(domain, N)).sum().backward()
    assert not layer.weight.grad[N - 1].any() and not layer.bias.grad[N - 1].any(), "a domain without rows"


def test_no_rows_have_no_blocks() -> None:
    found = domain_rows(torch.empty(0, dtype=torch.int64), N)
    assert len(found.of_blocks) == 0
    assert DomainLinear(N, V, 4, 3)(torch.empty(0, V, 4), found).shape == (0, V, 3)


def plain_ics(z: Tensor, alpha: Tensor) -> Tensor:
    x = z.clamp(min=0)
    for rate in alpha:
        x = (x - rate * x.sum() / len(x)).clamp(min=0)
    return x


def plain_view(of: DomainViews, x: Tensor, d: int, v: int) -> Tensor:
    """One view of one row, in words of one's own."""
    chosen: Any = of.filter
    if hasattr(chosen, "indices"):
        h = torch.stack([x[i] for i in chosen.indices[d, v].tolist()])
    else:
        part = slice(v * chosen.out_dim, (v + 1) * chosen.out_dim)
        h = plain_ics(x @ chosen.proj.weight[d, 0, :, part], chosen.alpha[d, v])
        if chosen.gamma is not None:
            h = h * chosen.gamma[d, v]
        if chosen.value is not None:
            h = h * (x @ chosen.value.weight[d, 0, :, part])
    z = h
    for dense in (of.dense, of.dense2):
        if dense is not None:
            z = z @ dense.weight[d, v] + dense.bias[d, v]
            z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if of.residual:
        z = h + z
    z = (z - z.mean()) / (z.var(unbiased=False) + of.eps).sqrt()
    return z * of.norm_weight[d, v] + of.norm_bias[d, v]


@every_case
def test_a_row_has_the_views_of_its_domain_behind_the_shared_ones(case: str) -> None:
    ssr = built(case)
    layer = ssr.blocks()[0]
    x, domain = drawn(BLOCK + 9, N - 1)
    of_domain: Any = layer.per_domain["tab"]  # type: ignore[index]
    own = torch.stack(
        [torch.stack([plain_view(of_domain, x[r], d, v) for v in range(V)]) for r, d in enumerate(domain.tolist())]
    )
    ours = layer(x, domain_rows(domain, N))
    assert ours.shape == (len(x), 3 + V, D)
    assert_same_gradients(of_domain, x, ours[:, 3:], own)
    without = copy.deepcopy(layer)
    without.per_domain = None
    assert torch.equal(ours[:, :3], without(x))


@every_case
def test_rows_are_scored_apart_in_any_order_and_by_two_layers(case: str) -> None:
    ssr = built(case).eval()
    x, domain = drawn(2 * BLOCK + 3)
    together = ssr(x, domain)
    order = torch.randperm(len(x))
    torch.testing.assert_close(ssr(x[order], domain[order]), together[order])
    for row in (0, 5, len(x) - 1):
        torch.testing.assert_close(ssr(x[row : row + 1], domain[row : row + 1])[0], together[row])
    assert (ssr(x, (domain + 1) % N) - together).abs().amin(0).max() > 1e-6, "the domain must count"


@every_case
def test_a_domain_that_was_never_trained_adds_nothing(case: str) -> None:
    """The scales of its views are those of the start, whatever the other domains have learned."""
    torch.manual_seed(1)
    ssr = SSR(5, 4, 1, SSRConfig(**SMALL, **CASES[case]), Domain("tab", N))
    optimizer = torch.optim.Adam(ssr.parameters(), lr=0.05)
    x, domain = drawn(64, N - 1)
    for _ in range(3):
        (ssr(x.float(), domain) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in ssr.blocks():
        views = layer.per_domain["tab"](torch.randn(40, layer.filter.width), domain_rows(torch.arange(40) % N, N))  # type: ignore[index]
        seen = torch.arange(40) % N != N - 1
        assert not views[~seen].any() and views[seen].any(2).all()


def test_dims_of_a_domains_views_do_not_depend_on_the_others() -> None:
    def dims(views: int, domains: int) -> Tensor:
        config = SSRConfig(**{**SMALL, "domain_views": views}, filter="static")
        return DomainViews(WIDTH, 1, config, domains).filter.indices  # type: ignore[return-value]

    many = dims(3, 6)
    assert torch.equal(many[:4, :2], dims(2, 4))
    assert len({tuple(view.tolist()) for view in many.flatten(0, 1)}) == 18
    assert all(len(set(view.tolist())) == D for view in many.flatten(0, 1))


@pytest.mark.parametrize("case", ["static switched", pytest.param("dynamic switched", marks=pytest.mark.slow)])
def test_parameters_flops_and_export(case: str) -> None:
    ssr = built(case).eval()
    of_domains = [layer.per_domain["tab"] for layer in ssr.blocks()]  # type: ignore[index]
    shared = SSR(5, 4, 1, SSRConfig(**{**SMALL, "domain_views": 0}, **CASES[case]))
    assert ssr.num_parameters > N * sum(p[0].numel() for of in of_domains for p in of.parameters())
    x, domain = drawn(BLOCK * N)
    # With full blocks alone there are no empty rows to multiply.
    domain = torch.arange(N).repeat_interleave(BLOCK)
    ssr(x, domain)
    with FlopCounterMode(display=False) as counter:
        ssr(x, domain)
    padded = (BLOCK * N + (BLOCK - 1) * N) // BLOCK * BLOCK
    views = sum(of.flops().matmul for of in of_domains)  # type: ignore[operator, union-attr]
    assert counter.get_total_flops() == (ssr.flops().matmul - views) * len(x) + views * padded
    assert ssr.flops().total > shared.flops().total
    if case == "static switched":
        return
    rows = {0: torch.export.Dim("rows", min=1)}
    program = torch.export.export(ssr, (x[:7], domain[:7]), dynamic_shapes=(rows, rows))
    for n in (1, 90):
        torch.testing.assert_close(program.module()(x[:n], domain[:n]), ssr(x[:n], domain[:n]))


@pytest.mark.parametrize("name", ["topk", "none", "dropout"])
def test_filters_without_views_of_domains_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"domain_views=2 are for the filters static.*{name}"):
        SSRConfig(filter=name, domain_views=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="domain_views=2 needs a domain"):
        SSR(5, 4, 1, SSRConfig(domain_views=2, view_dim=8))
