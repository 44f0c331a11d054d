"""GELU and its slope inside the operators, over all sizes of their argument, against float64."""

import pytest
import torch
from torch import Tensor

from ssr_rec.kernels import view_fusion
from tests.kernels.plain_loops import needs_compiler

pytestmark = needs_compiler


def gelu_of(z: Tensor) -> Tensor:
    """By the operator: one view of one dim, multiplied by one."""
    one = torch.ones(1, 1, 1, dtype=z.dtype)
    return view_fusion(z.reshape(-1, 1), torch.zeros(1, 1, dtype=torch.int64), one, torch.zeros(1, 1, dtype=z.dtype))[
        :, 0, 0
    ]


def sixteen_wide(z: Tensor) -> Tensor:
    """As 16 dims of a row, so that whole vectors are taken."""
    eye = torch.eye(16, dtype=z.dtype).unsqueeze(0)
    return view_fusion(z.reshape(-1, 1, 16), None, eye, torch.zeros(1, 16, dtype=z.dtype)).flatten()


@pytest.mark.parametrize("form", [gelu_of, sixteen_wide])
@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float32, 4e-7, 8e-7), (torch.float64, 1e-12, 1e-12)])
def test_value_and_slope(form, dtype, value, slope):
    # Nodes and edges of any table of a few pieces are among 160,000 places; and far beyond them.
    z = torch.cat(
        [torch.linspace(-8, 8, 160_000), torch.tensor([0.0, -0.0, 1e-30, -1e-30] + 3 * [30.0, -30.0, 1e4, -1e4])]
    )
    z = z.to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    wanted = torch.nn.functional.gelu(exact)
    wanted.sum().backward()
    found = form(z)
    found.sum().backward()
    assert ((found - wanted).abs() <= value * exact.abs().clamp(min=1)).all()
    assert (z.grad - exact.grad).abs().max() <= slope
    # No rounding leaves anything far below zero, where size times a rest would grow.
    assert found.detach()[exact < -20].abs().max() < 1e-6


@pytest.mark.parametrize(("form", "hurt"), [(gelu_of, [5]), (sixteen_wide, list(range(16)))])
def test_nan_stays_in_its_row(form, hurt):
    z = torch.linspace(-3, 3, 32)
    z[5] = float("nan")
    z.requires_grad_()
    y = form(z)
    y.sum().backward()
    assert y.isnan().nonzero().flatten().tolist() == hurt
    assert z.grad[5].isnan() and z.grad[16:].isfinite().all()
