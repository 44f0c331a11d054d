"""Dropout's own draws against the binomial distribution and torch's; what SSR does with them by its equations."""

import pytest
import torch
from torch.nn import functional as F

from ssr_rec.over_archs.layers import Dropout
from tests.small_ssr import batch, build


@pytest.mark.parametrize("p", [1e-5, 0.001, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_a_share_of_p_is_dropped_and_the_rest_scaled(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1003)
    y = Dropout(p).train()(x)
    kept = y != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    # A share of whole 65,536ths is at most half of one from the one asked for.
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation + 2**-17
    assert len(y[kept].unique()) == 1 and y[kept][0].item() == pytest.approx(1 / (1 - p), rel=0.01)
    assert abs(y.double().mean().item() - 1) < 5 * deviation / (1 - p)


def test_elements_are_dropped_apart_from_each_other_and_from_the_last_batch() -> None:
    torch.manual_seed(0)
    keep, other = (Dropout(0.3).draw((2000, 512), torch.device("cpu"))[0].double() - 0.7 for _ in range(2))
    for a, b in ((keep, other), *((keep[:, n:], keep[:, :-n]) for n in (1, 2, 3, 4, 16)), (keep[1:], keep[:-1])):
        assert abs((a * b).mean().item()) < 5 * 0.3 * 0.7 / 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_what_it_multiplied_by_and_the_seed_decides(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, 3, dtype=dtype).requires_grad_()
    dropout, results = Dropout(0.4).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = dropout(x)
        (factor,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, x * factor) and y.dtype == dtype
        results.append(factor)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_nothing_is_dropped_in_evaluation_or_without_a_share() -> None:
    x = torch.randn(4, 3)
    assert Dropout(0.5).eval()(x) is x and torch.equal(Dropout(0.0).train()(x), x)
    assert not Dropout(1.0).train()(x).any()
    assert Dropout(0.5).train()(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("residual", [False, True])
def test_ssr_drops_after_gelu_and_before_the_residual_and_the_norm(residual: bool) -> None:
    ssr, x = build(num_layers=1, residual=residual, fusion_dropout=0.5).train(), batch()
    layer = ssr.blocks()[0]
    h, fusion = layer.filter(x), layer.fusion
    torch.manual_seed(4)
    y = ssr(x)
    torch.manual_seed(4)
    keep, share = fusion.dropout.draw(h.shape[:2] + fusion.norm.weight.shape[1:], x.device)
    z = F.gelu(torch.einsum("bvn,vnd->bvd", h, fusion.dense.weight) + fusion.dense.bias)
    z = torch.where(keep, z / share, 0.0) + (h if residual else 0.0)
    mean, var = z.mean(-1, keepdim=True), z.var(-1, unbiased=False, keepdim=True)
    expected = (z - mean) / (var + fusion.norm.eps).sqrt() * fusion.norm.weight + fusion.norm.bias
    torch.testing.assert_close(y, expected.flatten(1))


def test_compiled_it_draws_as_often() -> None:
    x = torch.ones(400, 1000)
    for function in (Dropout(0.3).train(), lambda x: x * Dropout(0.3).draw(x.shape, x.device)[0]):
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        assert abs((y != 0).double().mean().item() - 0.7) < 5 * (0.21 / x.numel()) ** 0.5
