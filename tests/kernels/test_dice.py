"""Dice of a batch against scalars, PyTorch's batch norm and numeric gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssr_rec.kernels import extension
from ssr_rec.kernels.dice import dice, gated

EPS, MOMENTUM = 1e-8, 0.01


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    x = 3 * torch.randn(rows, width, dtype=torch.float64, generator=generator) + torch.arange(width)
    return x.to(dtype), torch.randn(width, dtype=torch.float64, generator=generator).to(dtype)


def run(x: Tensor, alpha: Tensor) -> Tensor:
    return dice(x, alpha, torch.zeros_like(alpha), torch.ones_like(alpha), MOMENTUM, EPS)


def plain(x: Tensor, alpha: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return gated(x, F.batch_norm(x, mean, var, None, None, True, MOMENTUM, EPS), alpha)


@pytest.fixture(autouse=True)
def operators() -> None:
    """Load them: a test may be the first in its process, and calls ``torch.ops`` itself."""
    assert extension.load()


@pytest.mark.parametrize("rows", [2, 5])
def test_equals_scalars(rows: int) -> None:
    x, alpha = inputs(rows, 3)
    expected = []
    for c, column in enumerate(x.T.tolist()):
        mean = sum(column) / rows
        deviation = math.sqrt(sum((value - mean) ** 2 for value in column) / rows + EPS)
        gates = [1 / (1 + math.exp(-(value - mean) / deviation)) for value in column]
        expected.append([p * v + (1 - p) * alpha[c].item() * v for p, v in zip(gates, column, strict=True)])
    torch.testing.assert_close(run(x, alpha), torch.tensor(expected, dtype=x.dtype).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "width"), [(2, 1), (7, 8), (300, 19), (1_025, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_gradients_and_statistics_are_batch_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, alpha = inputs(rows, width, dtype)
    weights = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for form, kind in ((dice, dtype), (lambda *given: plain(*given[:4]), torch.float64)):
        leaves = [x.to(kind).requires_grad_(), alpha.to(kind).requires_grad_()]
        running = [torch.zeros(width, dtype=kind), torch.ones(width, dtype=kind)]
        y = form(*leaves, *running, MOMENTUM, EPS)
        found.append([y, *torch.autograd.grad((y * weights).sum(), leaves), *running])
    for ours, theirs in zip(*found, strict=True):
        largest = theirs.abs().max().item()
        atol = (2e-6 if dtype == torch.float32 else 1e-12) * largest
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)


def test_numeric_gradients() -> None:
    x, alpha = inputs(9, 5)
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), alpha.requires_grad_()))


def test_threads_decide_no_bit() -> None:
    x, alpha = inputs(3_000, 40, torch.float32)
    leaves = [x.requires_grad_(), alpha.requires_grad_()]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = run(x, alpha)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_far_from_zero_are_as_exact_as_batch_norms() -> None:
    x, alpha = inputs(2_000, 8, torch.float32)
    far = x + 1e4
    exact = plain(far.double(), alpha.double(), torch.zeros(8).double(), torch.ones(8).double())
    ours, theirs = (run(far, alpha), plain(far, alpha, torch.zeros(8), torch.ones(8)))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_an_outlier_in_the_first_row_costs_no_digits() -> None:
    x, alpha = torch.zeros(700, 1), torch.full((1,), 0.25)
    x[:, 0] = torch.randn(700, generator=torch.Generator().manual_seed(0))
    x[0] = 1e8
    _, mean, var = torch.ops.ssr_rec.dice_forward(x, alpha, EPS)
    assert mean.item() == pytest.approx(x.double().mean().item(), rel=5e-6)
    assert var.item() == pytest.approx(x.double().var(0, correction=0).item(), rel=5e-6)


def test_large_constant_columns_have_no_spread() -> None:
    x, alpha = torch.full((700, 3), 1e160, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    y, mean, var = torch.ops.ssr_rec.dice_forward(x, alpha, EPS)
    assert y.isfinite().all() and (var / mean.square()).abs().max() < 1e-30


@pytest.mark.parametrize(
    ("x", "alpha"),
    [((4, 3, 5), (5,)), ((50, 64), (1,)), ((0, 4), (4,)), ((4,), (4,))],
)
def test_shapes_that_do_not_belong_together_are_refused(x: tuple[int, ...], alpha: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"x must be \(N, C\)"):
        torch.ops.ssr_rec.dice_forward(torch.ones(x), torch.ones(alpha), EPS)
    if len(x) == 2 and x[0] and alpha[0] == 1:
        with pytest.raises(RuntimeError, match="gradient must be like x"):
            torch.ops.ssr_rec.dice_backward(torch.ones(1, 64), torch.ones(x), *[torch.ones(64)] * 3, EPS)


def test_a_row_that_is_not_a_number_is_seen_in_every_row() -> None:
    x, alpha = inputs(300, 10, torch.float32)
    x[4, 2] = math.nan
    y = run(x, alpha)
    assert y[:, 2].isnan().all() and not y[:, [c for c in range(10) if c != 2]].isnan().any()


def test_views_and_other_strides() -> None:
    x, alpha = inputs(60, 20, torch.float32)
    turned = x.T.contiguous().T
    assert torch.equal(run(turned, alpha), run(x, alpha))
    assert torch.equal(run(x[::2, 3:11], alpha[3:11]), run(x[::2, 3:11].contiguous(), alpha[3:11].contiguous()))


def test_a_second_derivative_is_refused() -> None:
    x, alpha = inputs(8, 4)
    (slope,) = torch.autograd.grad(run(x.requires_grad_(), alpha).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_fake_tensors_have_its_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, alpha = torch.empty(12, 6, requires_grad=True), torch.empty(6, requires_grad=True)
        y = run(x, alpha)
        y.sum().backward()
        assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
