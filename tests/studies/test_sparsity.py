"""Figures of sparsity against plain loops and sets."""

from __future__ import annotations

import math

import pytest
import torch

from ssr_rec.over_archs.base import Domain
from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig
from ssr_rec.studies.sparsity import _overlap, view_figures, weight_figures
from tests.small_ssr import DV, D, F, V, batch, build


def test_weight_figures_count_as_a_plain_loop_does() -> None:
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(3)) ** 5 / 100
    small = sum(abs(value) < 1e-3 for row in weight.tolist() for value in row) / 77
    expected = {"near_zero": small}
    for name, power in (("mass_dims", 1), ("power_dims", 2)):
        columns = sorted((sum(abs(row[j]) ** power for row in weight.tolist()) for j in range(11)), reverse=True)
        dims = next(n for n in range(1, 12) if sum(columns[:n]) >= 0.8 * sum(columns))
        expected[name] = dims / 11
    found = weight_figures(weight)
    assert 0 < small < 1 and expected["mass_dims"] != expected["power_dims"]
    assert found == pytest.approx(expected)


def test_a_layer_whose_inputs_count_alike_has_most_of_them() -> None:
    assert weight_figures(torch.ones(3, 10))["mass_dims"] == 0.8
    assert weight_figures(torch.zeros(3, 10)) == {"near_zero": 1, "mass_dims": 1, "power_dims": 1}


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_projections_and_survivors_of_two_views_are_compared_as_loops_do() -> None:
    ssr, x = build(filter="dynamic", alpha_init=0.4), batch(5)
    found = view_figures(ssr, x)
    first = ssr.blocks()[0].filter
    w = first.proj.weight.reshape(V, DV, F * D).tolist()
    h = first.sparse(x).tolist()
    for i in range(V):
        for j in range(V):
            flat = [[value for row in w[v] for value in row] for v in (i, j)]
            assert found[0]["cosine"][i, j].item() == pytest.approx(cosine(*flat))
            total = 0.0
            for row in h:
                behind = []
                for v in (i, j):
                    sums = [sum(abs(w[v][k][m]) for k in range(DV) if row[v][k] != 0) for m in range(F * D)]
                    mean = sum(sums) / len(sums)
                    behind.append([value - mean for value in sums])
                total += cosine(*behind) if all(any(b) for b in behind) else 0.0
            assert found[0]["overlap"][i, j].item() == pytest.approx(total / len(h))
    pairs = [found[0]["cosine"][i, j].item() for i in range(V) for j in range(V) if i != j]
    assert found[0]["mean_cosine"] == pytest.approx(sum(pairs) / len(pairs))


def test_static_views_overlap_by_the_dims_they_share() -> None:
    ssr, x = build(filter="static"), batch()
    for figures, layer in zip(view_figures(ssr, x), ssr.blocks(), strict=True):
        assert "cosine" not in figures
        sets = [set(view) for view in layer.filter.indices.tolist()]
        for i, a in enumerate(sets):
            for j, b in enumerate(sets):
                assert figures["overlap"][i, j].item() == pytest.approx(len(a & b) / len(a | b))


def test_views_of_a_domain_stand_beside_those_that_are_compared() -> None:
    domain, x = torch.tensor([0, 2, 1, 0, 2, 2]), batch().float()
    torch.manual_seed(0)
    ssr = SSR(F, D, 1, SSRConfig(filter="dynamic", num_views=V, view_dim=DV, domain_views=1), Domain("tab", 3)).eval()
    first, second = view_figures(ssr, x, domain)
    seen = ssr.blocks()[0](x, *ssr.rows_of(domain))
    assert seen.shape[1] == V + 1 and first["overlap"].shape == second["overlap"].shape == (V, V)
    weight = ssr.blocks()[1].filter.proj.weight.unflatten(0, (V, -1))
    expected = _overlap(ssr.blocks()[1].filter.sparse(seen.flatten(1)), weight)
    assert torch.allclose(second["overlap"], expected)


def test_one_view_and_other_filters_have_nothing_to_compare() -> None:
    assert view_figures(build(filter="dynamic", num_views=1), batch())[0]["mean_cosine"] is None
    assert view_figures(build(filter="none"), batch()) == []
