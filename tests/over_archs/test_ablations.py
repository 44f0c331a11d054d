"""The filters of the paper's Table 4, against plain loops."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from ssr_rec.over_archs.ssr_settings import SSRConfig
from tests.small_ssr import DV, D, V, batch, build
from tests.small_ssr import F as FIELDS


def fused(ssr, layer: int, view: int, h: torch.Tensor) -> torch.Tensor:
    """Eq. 5 and 6 for one view, written out."""
    fusion = ssr.blocks()[layer].fusion
    z = F.gelu(h @ fusion.dense.weight[view] + fusion.dense.bias[view])
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return z * fusion.norm.weight[view] + fusion.norm.bias[view]


def test_without_filter_every_view_fuses_the_whole_input() -> None:
    ssr, x = build(filter="none"), batch()
    y = x
    for layer in range(2):
        y = torch.cat([fused(ssr, layer, view, y) for view in range(V)], dim=1)
    torch.testing.assert_close(ssr(x), y)
    assert ssr.blocks()[0].fusion.dense.weight.shape == (V, FIELDS * D, DV)


def test_top_k_keeps_the_largest_and_sends_gradients_through_all() -> None:
    ssr, x = build(filter="topk", top_k=3, num_layers=1), batch()
    z = (x @ ssr.blocks()[0].filter.proj.weight.T).view(len(x), V, DV)
    h = torch.zeros_like(z)
    for row in range(len(x)):
        for view in range(V):
            for dim in sorted(range(DV), key=lambda i: -z[row, view, i])[:3]:
                h[row, view, dim] = z[row, view, dim]
    torch.testing.assert_close(ssr.blocks()[0].filter(x), h)
    torch.testing.assert_close(ssr(x), torch.cat([fused(ssr, 0, view, h[:, view]) for view in range(V)], dim=1))

    weight = torch.randn(len(x), V, DV, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((ssr.blocks()[0].filter(x) * weight).sum(), ssr.blocks()[0].filter.proj.weight)
    torch.testing.assert_close(gradient, weight.flatten(1).T @ x)


def test_dropout_masks_every_view_apart_and_only_in_training() -> None:
    ssr, x = build(filter="dropout", filter_dropout=0.5), 1 + batch(64).abs()
    dropout = ssr.blocks()[0].filter
    h = dropout.train()(x)
    kept = h != 0
    torch.testing.assert_close(h[kept], (2 * x).unsqueeze(1).expand_as(h)[kept])
    assert 0.4 < kept.double().mean() < 0.6
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(dropout.eval()(x), x.unsqueeze(1).expand_as(h))


def test_one_view_is_a_config() -> None:
    ssr, x = build(num_views=1, view_dim=DV * V), batch()
    assert ssr(x).shape == (len(x), DV * V)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter": "topk", "view_dim": 8, "top_k": 9}, r"top_k=9.*at most view_dim=8"),
        ({"filter": "none", "residual": True}, "residual=True"),
        ({"filter": "dropout", "residual": True}, "residual=True"),
        ({"filter": "dynamic", "filter_dim": 200, "residual": True}, "filter_dim=200.*view_dim=128: make them equal"),
        ({"filter": "static", "filter_dim": 200}, "filter_dim=200 has no effect"),
        ({"filter": "dynamic", "top_k": 3}, r"top_k=3 has no effect.*filter='topk'"),
        ({"filter": "static", "filter_dropout": 0.2}, r"filter_dropout=0\.2 has no effect"),
        ({"filter": "topk", "iterations": 2}, "iterations=2 has no effect"),
    ],
)
def test_switches_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SSRConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"filter": "topk", "top_k": 4}, "SSR top-4 8x128x2"),
        ({"filter": "none"}, "SSR without filter 8x128x2"),
        ({"filter": "dynamic", "filter_dim": 256}, "SSR-D 8x256-128x2"),
        ({"filter": "dropout", "filter_dropout": 0.3}, "SSR dropout 0.3 8x128x2"),
    ],
)
def test_labels(settings: dict, label: str) -> None:
    assert SSRConfig(**settings).label == label
