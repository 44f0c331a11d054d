"""Filter-and-fuse with weights in bfloat16: rounded factors, float sums, against the plain form in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssr_rec.kernels import view_fusion, view_fusion_reference
from tests.kernels.plain_loops import needs_compiler

pytestmark = needs_compiler

EPS = 1e-6
SHAPES = {"narrow": (3, 8, 8, 20), "odd": (2, 5, 7, 11), "one view": (1, 16, 16, 40), "wide": (2, 128, 132, 200)}


def draw(shape: str, rows: int, norm: bool = True) -> tuple[Tensor, ...]:
    views, seen, dim, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator)
    indices = torch.stack([torch.randperm(width, generator=generator)[:seen] for _ in range(views)])
    weight = torch.randn(views, dim, seen, generator=generator) / seen**0.5
    rest = [torch.randn(views, dim, generator=generator) for _ in range(3)]
    return x, indices, weight.to(torch.bfloat16).mT, rest[0], None, *(rest[1:] if norm else (None, None))


def expected(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, residual: None, *norm: Tensor | None) -> Tensor:
    """Odd numbers of dims have no product in bfloat16: there the weights alone are rounded."""
    if indices.shape[1] % 2 == 0:
        x = x.to(torch.bfloat16)
    scale, shift = (None if t is None else t.double() for t in norm)
    return view_fusion_reference(x.double(), indices, weight.double(), bias.double(), None, scale, shift, EPS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 15, 37, 64, 300])
def test_is_the_plain_form_of_rounded_factors(shape: str, norm: bool, rows: int) -> None:
    tensors = draw(shape, rows, norm)
    y = view_fusion(*tensors, eps=EPS)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected(*tensors), rtol=2e-5, atol=2e-5)
    contiguous = (*tensors[:2], tensors[2].contiguous(), *tensors[3:])
    assert torch.equal(view_fusion(*contiguous, eps=EPS), y)


def test_output_lies_as_a_graph_expects_and_is_read_by_the_next_layer() -> None:
    tensors = draw("wide", 150)
    y = view_fusion(*tensors, eps=EPS)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = view_fusion(*(t if t is None else mode.from_tensor(t) for t in tensors), eps=EPS)
    assert fake.shape == y.shape and fake.stride() == y.stride() and y.stride(0) == 1
    wide = y.flatten(1)
    assert wide.data_ptr() == y.data_ptr()
    views, seen, dim, _ = SHAPES["wide"]
    indices = torch.stack([torch.arange(dim * views)[view::2][:seen] for view in range(views)])
    again = (wide, indices, *tensors[2:])
    copied = (wide.contiguous(), indices, *tensors[2:])
    assert torch.equal(view_fusion(*again, eps=EPS), view_fusion(*copied, eps=EPS))
    torch.testing.assert_close(view_fusion(*again, eps=EPS).double(), expected(*again), rtol=2e-5, atol=2e-5)


def test_the_number_of_threads_does_not_matter() -> None:
    tensors = draw("wide", 300)
    one = view_fusion(*tensors, eps=EPS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(view_fusion(*tensors, eps=EPS), one)
    finally:
        torch.set_num_threads(before)


def test_rounding_is_that_of_bfloat16() -> None:
    """An identity as weight shows what becomes of x: ties go to even, and a NaN stays in its row."""
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, -1.01171875, 1e30, 1e-40, 0.0, -0.0])
    values = torch.cat([ties, torch.from_numpy(np.random.default_rng(0).normal(size=32)).float()])
    eye = torch.eye(2, dtype=torch.bfloat16).unsqueeze(0)
    indices, bias = torch.tensor([[0, 1]]), torch.full((1, 2), 10.0)
    y = view_fusion(values.reshape(20, 2), indices, eye, bias)[:, 0]
    rounded = values.to(torch.bfloat16).float().reshape(20, 2)
    torch.testing.assert_close(y, torch.nn.functional.gelu(rounded + 10), rtol=1e-6, atol=1e-6)
    nan = torch.zeros(20, 2)
    nan[3, 1] = float("nan")
    assert view_fusion(nan, indices, eye, bias).isnan().any(2).squeeze(1).nonzero().tolist() == [[3]]


def test_gradients_and_residuals_are_refused_or_plain() -> None:
    x, indices, weight, bias, _, scale, shift = draw("narrow", 4)
    with pytest.raises((ValueError, RuntimeError), match="scoring"):
        view_fusion(x.requires_grad_(), indices, weight, bias, None, scale, shift, EPS)
    with pytest.raises((ValueError, RuntimeError), match="index 99"):
        view_fusion(x.detach(), indices.clone().fill_(99), weight, bias, None, scale, shift, EPS)
    own = x.detach()[:, indices]
    plain = view_fusion_reference(own, None, weight.float(), bias, None, scale, shift, EPS)
    torch.testing.assert_close(view_fusion(own, None, weight, bias, None, scale, shift, EPS), plain)
