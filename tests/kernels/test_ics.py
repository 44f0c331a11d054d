"""ICS against Algorithm 1 written out in scalars."""

import pytest
import torch
from torch import Tensor

from ssr_rec.kernels import ics

B, V, D, T = 3, 2, 7, 4


def algorithm_1(z: list[float], alphas: list[float], gamma: list[float]) -> list[float]:
    x = [v if v > 0.0 else 0.0 for v in z]
    for alpha in alphas:
        mu = sum(x) / len(x)
        x = [max(0.0, v - alpha * mu) for v in x]
    return [g * v for g, v in zip(gamma, x, strict=True)]


def by_hand(z: Tensor, alpha: Tensor, gamma: Tensor | None) -> Tensor:
    scale = torch.ones(z.shape[1:], dtype=z.dtype) if gamma is None else gamma
    rows = [
        [algorithm_1(row[v].tolist(), alpha[v].tolist(), scale[v].tolist()) for v in range(z.shape[1])] for row in z
    ]
    return torch.tensor(rows, dtype=z.dtype)


def inputs(seed: int = 0, steps: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(B, V, D, dtype=torch.float64, generator=generator)
    alpha = 0.1 + 0.3 * torch.rand(V, steps, dtype=torch.float64, generator=generator)
    gamma = torch.randn(V, D, dtype=torch.float64, generator=generator)
    return z, alpha, gamma


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_equals_the_scalar_loop(steps: int) -> None:
    z, alpha, gamma = inputs(steps=steps)
    torch.testing.assert_close(ics(z, alpha, gamma), by_hand(z, alpha, gamma), rtol=0, atol=1e-14)


def test_without_gamma() -> None:
    z, alpha, _ = inputs()
    torch.testing.assert_close(ics(z, alpha, None), by_hand(z, alpha, None), rtol=0, atol=1e-14)


def test_a_small_case_worked_on_paper() -> None:
    z = torch.tensor([[[4.0, 2.0, 0.0, -5.0]]])  # mean 1.5 -> 3.25, 1.25, 0, 0; mean 1.125 -> 2.125, 0.125
    y = ics(z, torch.tensor([[0.5, 1.0]]), torch.tensor([[2.0, 1.0, 1.0, 1.0]]))
    assert y.tolist() == [[[4.25, 0.125, 0.0, 0.0]]]


def test_the_mean_counts_dead_dims() -> None:
    dense = ics(torch.tensor([[[2.0, 2.0]]]), torch.tensor([[0.5]]), None)
    padded = ics(torch.tensor([[[2.0, 2.0, 0.0, 0.0]]]), torch.tensor([[0.5]]), None)
    assert dense.tolist() == [[[1.0, 1.0]]]
    assert padded.tolist() == [[[1.5, 1.5, 0.0, 0.0]]]


def test_a_negative_alpha_revives_dead_dims() -> None:
    z, alpha, gamma = inputs(seed=1)
    alpha[:, 1] = -0.4
    alpha[1, 3] = -0.2
    y = ics(z, alpha, gamma)
    torch.testing.assert_close(y, by_hand(z, alpha, gamma), rtol=0, atol=1e-14)
    assert (y[z < 0] != 0).any()


def test_views_and_rows_do_not_mix() -> None:
    z, alpha, gamma = inputs()
    before = ics(z, alpha, gamma)
    z[0, 0] += 3.0
    alpha[1, 2] += 0.5
    after = ics(z, alpha, gamma)
    assert torch.equal(after[1:, 0], before[1:, 0])
    assert not torch.equal(after[0, 0], before[0, 0])
    assert not torch.equal(after[1:, 1], before[1:, 1])


@pytest.mark.parametrize("z", [torch.zeros(B, V, D), -torch.ones(B, V, D)], ids=["zeros", "all negative"])
def test_a_row_without_positives_stays_zero(z: Tensor) -> None:
    _, alpha, gamma = inputs()
    z = z.double().requires_grad_()
    y = ics(z, alpha, gamma)
    y.sum().backward()
    assert not y.any()
    assert z.grad is not None and not z.grad.any()


def test_ties_share_one_fate() -> None:
    z = torch.tensor([[[1.0, 1.0, 3.0, 3.0, 0.0]]], dtype=torch.float64)
    alpha = torch.full((1, 3), 0.5, dtype=torch.float64)
    y = ics(z, alpha, None)
    torch.testing.assert_close(y, by_hand(z, alpha, None), rtol=0, atol=1e-14)
    assert y[0, 0, 0] == y[0, 0, 1] == 0
    assert y[0, 0, 2] == y[0, 0, 3] > 0


def test_all_equal_dims_die_at_alpha_one() -> None:
    assert not ics(torch.full((1, 1, 4), 2.0), torch.tensor([[1.0]]), None).any()


@pytest.mark.parametrize("sign", ["positive", "mixed"])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_gradients_of_all_three_inputs(sign: str, with_gamma: bool) -> None:
    z, alpha, gamma = inputs(seed=2)
    if sign == "mixed":
        alpha[:, ::2] *= -1
    leaves = [t.requires_grad_() for t in ((z, alpha, gamma) if with_gamma else (z, alpha))]
    assert torch.autograd.gradcheck(lambda *t: ics(t[0], t[1], t[2] if with_gamma else None), leaves)


def test_strided_input_and_input_untouched() -> None:
    z, alpha, gamma = inputs()
    strided = z.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    copy = strided.clone()
    assert torch.equal(ics(strided, alpha, gamma), ics(z, alpha, gamma))
    assert torch.equal(strided, copy)
