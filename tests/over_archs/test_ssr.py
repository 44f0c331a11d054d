"""SSR against the paper's equations written per view; its initial weights, cost and statistics."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ssr_rec.over_archs.ssr import SSR, ssr_statistics
from ssr_rec.over_archs.ssr_settings import SSRConfig
from tests.small_ssr import DV, SMALL, STATIC, D, F, L, V, batch, build


def gelu(v: float) -> float:
    return 0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0)))


def paper_forward(ssr: SSR, x: Tensor) -> np.ndarray:
    """Eq. 1-11 for one sample and one view at a time, from nothing but the state dict."""
    w = {key: value.numpy() for key, value in ssr.state_dict().items()}
    rows = []
    for x_row in x.numpy():
        y = x_row
        for i in range(L):
            p = f"layers.{i}."
            views = []
            for v in range(V):
                if p + "filter.indices" in w:
                    h = np.array([y[j] for j in w[p + "filter.indices"][v]])
                else:
                    dims = ssr.config.filter_dim or DV
                    w_proj = w[p + "filter.proj.weight"][v * dims : (v + 1) * dims].T
                    h = np.maximum(y @ w_proj, 0.0)
                    for alpha in w[p + "filter.alpha"][v]:
                        h = np.maximum(h - alpha * h.sum() / dims, 0.0)
                    h = w[p + "filter.gamma"][v] * h
                z = h @ w[p + "fusion.dense.weight"][v] + w[p + "fusion.dense.bias"][v]
                z = np.array([gelu(value) for value in z])
                z = (z - z.mean()) / np.sqrt(((z - z.mean()) ** 2).mean() + 1e-6)
                views.append(z * w[p + "fusion.norm.weight"][v] + w[p + "fusion.norm.bias"][v])
            y = np.concatenate(views)
        rows.append(y)
    return np.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [{"filter": "static"}, {"filter": "dynamic"}, {"filter": "dynamic", "filter_dim": 13}],
    ids=["static", "dynamic", "dynamic, wider before the fusion"],
)
def test_equals_the_papers_equations(settings: dict) -> None:
    ssr, x = build(**settings), batch()
    np.testing.assert_allclose(ssr(x).detach().numpy(), paper_forward(ssr, x), rtol=0, atol=1e-12)


def test_defaults_are_the_papers() -> None:
    ssr = SSR(F, D, 1, SSRConfig(**SMALL))
    for layer in ssr.blocks():
        assert torch.equal(layer.filter.alpha, torch.full((V, 5), 0.1))
        assert torch.equal(layer.filter.gamma, torch.ones(V, DV))
    assert SSRConfig().iterations == 5


def test_without_gamma_equals_gamma_one() -> None:
    plain, without, x = build(), build(gamma=False), batch()
    without.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(x), without(x))
    with torch.no_grad():
        for layer in plain.blocks():
            layer.filter.gamma.fill_(1.0)
    assert torch.equal(plain(x), without(x))


def test_an_ics_filter_zeroes_dims_exactly() -> None:
    ssr, x = SSR(F, D, 1, SSRConfig(**SMALL, alpha_init=0.5)).double(), batch(64)
    h = ssr.blocks()[0].filter(x)
    assert h.shape == (64, V, DV)
    assert 0.5 < (h == 0).double().mean() < 0.95


def test_glorot_is_per_view_whatever_the_number_of_views() -> None:
    torch.manual_seed(0)
    ssr = SSR(8, 50, 1, SSRConfig(filter="dynamic", num_views=16, view_dim=100, num_layers=1))
    layer = ssr.blocks()[0]
    assert layer.filter.proj.weight.std().item() == pytest.approx(math.sqrt(2 / (400 + 100)), rel=0.02)
    assert layer.fusion.dense.weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    assert layer.fusion.dense.weight.abs().max().item() <= math.sqrt(6 / 200)
    assert layer.filter.proj.weight.abs().max().item() > 3 * math.sqrt(2 / 500)
    assert not layer.fusion.dense.bias.any()


def test_torch_initializer_has_the_bounds_of_nn_linear() -> None:
    torch.manual_seed(0)
    layer = SSR(
        8, 50, 1, SSRConfig(filter="dynamic", num_views=16, view_dim=100, num_layers=1, initializer="torch")
    ).blocks()[0]
    for tensor, fan_in in ((layer.filter.proj.weight, 400), (layer.fusion.dense.weight, 100)):
        assert 0.99 < tensor.abs().max().item() * math.sqrt(fan_in) <= 1
    assert 0.9 < layer.fusion.dense.bias.abs().max().item() * 10 <= 1


def test_the_size_of_the_released_avazu_run() -> None:
    """Its log: 3,121,361 trainable parameters without tables and input norm, 27,833,249 numbers with 1,544,489 x 16."""
    config = SSRConfig(filter="dynamic", gate=True, residual=True, output="mean", input_norm="across_fields")
    ssr, head = SSR(23, 16, 1, config), 128 + 1
    input_norm = {id(p) for p in ssr.input_norm.parameters()}
    assert sum(p.numel() for p in ssr.parameters() if id(p) not in input_norm) + head == 3_121_361
    assert sum(tensor.numel() for tensor in ssr.state_dict().values()) + head == 27_833_249 - 1_544_489 * 16
    # TensorFlow's profiler counts elementwise operations a little otherwise.
    assert 1024 * (ssr.flops_per_sample + 2 * head - 1) == pytest.approx(6_427_853_904, rel=0.003)


def test_flops_by_hand() -> None:
    wide, steps = V * DV, 5
    fusion_matmul, fusion_rest = 2 * wide * DV, wide * (1 + 5 + 7)
    static = SSR(F, D, 1, SSRConfig(**STATIC)).flops()
    assert (static.matmul, static.elementwise) == (L * fusion_matmul, L * fusion_rest)
    dynamic = SSR(F, D, 1, SSRConfig(**SMALL)).flops()
    assert dynamic.matmul == 2 * (F * D + wide) * wide + L * fusion_matmul
    assert dynamic.elementwise == L * (fusion_rest + wide * (1 + 3 * steps + 1) + V * steps)


def test_statistics_of_ssr_d() -> None:
    ssr, x = build(), batch(40)
    with torch.no_grad():
        ssr.blocks()[1].filter.alpha[2, 1] = -0.3
        ssr.blocks()[1].filter.alpha[:2].abs_()
        ssr.blocks()[1].filter.alpha[2, 2:].abs_()
        ssr.blocks()[1].filter.alpha[2, 0].abs_()
    report = json.loads(json.dumps(ssr_statistics(ssr, x)))
    assert report["filter"] == "dynamic" and len(report["layers"]) == L
    first = ssr.blocks()[0]
    share = [(first.filter(x)[:, v] == 0).double().mean().item() for v in range(V)]
    assert report["layers"][0]["sparsity_per_view"] == pytest.approx(share)
    assert report["layers"][0]["sparsity"] == pytest.approx(sum(share) / V)
    assert report["layers"][1]["negative_alphas"] == 1
    assert np.argwhere(np.array(report["layers"][1]["alpha"]) < 0).tolist() == [[2, 1]]


def test_statistics_look_at_ics_not_at_the_gate() -> None:
    ssr = build(gate=True)
    before = ssr_statistics(ssr, batch(40))["layers"][0]["sparsity"]
    with torch.no_grad():
        ssr.blocks()[0].filter.value.weight.zero_()
    assert ssr_statistics(ssr, batch(40))["layers"][0]["sparsity"] == before < 1


def test_statistics_of_ssr_s() -> None:
    settings = {"filter": "static", "num_views": 1, "view_dim": 5, "num_layers": 1}
    assert ssr_statistics(build(**settings), batch())["layers"] == [{"input_coverage": 5 / (F * D)}]


def test_statistics_leave_the_model_as_it_was() -> None:
    ssr = build(input_norm="per_dim", fusion_dropout=0.5, input_dropout=0.5).train()
    ssr.input_norm.eval()
    before = {key: value.clone() for key, value in ssr.state_dict().items()}
    modes = [module.training for module in ssr.modules()]
    rng = torch.get_rng_state()
    first, second = ssr_statistics(ssr, batch()), ssr_statistics(ssr, batch())
    assert first == second
    assert all(torch.equal(value, before[key]) for key, value in ssr.state_dict().items())
    assert modes == [module.training for module in ssr.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in ssr.parameters())
