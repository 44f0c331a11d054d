"""Filter-and-fuse for scoring, against the plain form in float64; with bfloat16: of rounded factors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssr_rec.kernels import view_scoring
from ssr_rec.kernels.reference import view_fusion_reference
from tests.kernels.plain_loops import needs_compiler

pytestmark = needs_compiler

EPS = 1e-6
SHAPES = {
    "narrow": (3, 8, 8, 20),
    "odd": (2, 5, 7, 11),
    "one view": (1, 16, 16, 40),
    "square": (2, 18, 18, 30),
    "wide": (2, 128, 132, 200),
}


def draw(shape: str, rows: int, norm: bool = True, dtype: torch.dtype = torch.bfloat16) -> list[Tensor | None]:
    views, seen, dim, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator)
    indices = torch.stack([torch.randperm(width, generator=generator)[:seen] for _ in range(views)])
    weight_t = torch.randn(views, dim, seen, generator=generator) / seen**0.5
    rest = [torch.randn(views, dim, generator=generator) for _ in range(3)]
    return [x, indices, weight_t.to(dtype), rest[0], *(rest[1:] if norm else (None, None))]


def expected(
    x: Tensor,
    indices: Tensor,
    weight_t: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: bool = False,
) -> Tensor:
    """Odd numbers of dims have no product in bfloat16: there the weights alone are rounded. The residual never is."""
    seen = torch.stack([x.double()[:, row] for row in indices], 1) if residual else None
    if indices.shape[1] % 2 == 0:
        x = x.to(weight_t.dtype)
    norm = (None if t is None else t.double() for t in (scale, shift))
    return view_fusion_reference(x.double(), indices, weight_t.mT.double(), bias.double(), seen, *norm, EPS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 12, 15, 37, 64, 300])
def test_is_the_plain_form_of_rounded_factors(shape: str, norm: bool, rows: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = draw(shape, rows, norm, dtype)
        y = view_scoring(*tensors, eps=EPS)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected(*tensors), rtol=2e-5, atol=2e-5)
        other = (*tensors[:2], tensors[2].mT.contiguous().mT, *tensors[3:])
        assert torch.equal(view_scoring(*other, eps=EPS), y)
        in_rows = view_scoring(*tensors, eps=EPS, turned=False)
        assert torch.equal(in_rows, y) and in_rows.is_contiguous()


@pytest.mark.parametrize("shape", ["narrow", "one view", "square"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 12, 37, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_is_what_a_view_sees(shape: str, norm: bool, rows: int, dtype: torch.dtype) -> None:
    tensors = draw(shape, rows, norm, dtype)
    few = tensors[2].mT.contiguous() if dtype == torch.float32 else None
    wanted = expected(*tensors, residual=True)
    for x in (tensors[0], tensors[0].T.contiguous().T):
        for turned in (True, False):
            y = view_scoring(x, *tensors[1:], EPS, few, turned, residual=True)
            torch.testing.assert_close(y.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 12, 13])
def test_few_rows_go_another_way_where_it_is_given(rows: int) -> None:
    tensors = draw("wide", rows, dtype=torch.float32)
    y = view_scoring(*tensors, EPS, tensors[2].mT.contiguous())
    torch.testing.assert_close(y.double(), expected(*tensors), rtol=2e-5, atol=2e-5)
    turned = view_scoring(tensors[0].T.contiguous().T, *tensors[1:], EPS, tensors[2].mT.contiguous())
    assert torch.equal(turned, y)
    in_rows = view_scoring(*tensors, EPS, tensors[2].mT.contiguous(), turned=False)
    assert torch.equal(in_rows, y) and in_rows.is_contiguous()
    zeros = view_scoring(*tensors, EPS, torch.zeros_like(tensors[2].mT.contiguous()))
    assert torch.equal(zeros, y) == (rows > 12), "from 13 rows on the second weight is not read"


def test_output_lies_as_a_graph_expects_and_is_read_by_the_next_layer() -> None:
    tensors = draw("wide", 150)
    y = view_scoring(*tensors, eps=EPS)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [t if t is None else mode.from_tensor(t) for t in tensors]
        fake = view_scoring(*fakes, eps=EPS)
        assert view_scoring(*fakes, eps=EPS, turned=False).is_contiguous()
    assert fake.shape == y.shape and fake.stride() == y.stride() and y.stride(0) == 1
    wide = y.flatten(1)
    assert wide.data_ptr() == y.data_ptr()
    views, seen, dim, _ = SHAPES["wide"]
    indices = torch.stack([torch.arange(dim * views)[view::2][:seen] for view in range(views)])
    again = (wide, indices, *tensors[2:])
    copied = (wide.contiguous(), indices, *tensors[2:])
    assert torch.equal(view_scoring(*again, eps=EPS), view_scoring(*copied, eps=EPS))
    torch.testing.assert_close(view_scoring(*again, eps=EPS).double(), expected(*again), rtol=2e-5, atol=2e-5)


def test_the_number_of_threads_does_not_matter() -> None:
    tensors = draw("wide", 300)
    one = view_scoring(*tensors, eps=EPS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(view_scoring(*tensors, eps=EPS), one)
    finally:
        torch.set_num_threads(before)


def test_rounding_is_that_of_bfloat16() -> None:
    """An identity as weight shows what becomes of x: ties go to even, and a NaN stays in its row."""
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, -1.01171875, 1e30, 1e-40, 0.0, -0.0])
    # Ties among the first 16 rows, which are one vector, and behind them.
    values = torch.cat([ties, torch.from_numpy(np.random.default_rng(0).normal(size=32)).float(), ties])
    eye = torch.eye(2, dtype=torch.bfloat16).unsqueeze(0)
    indices, bias = torch.tensor([[0, 1]]), torch.full((1, 2), 10.0)
    y = view_scoring(values.reshape(24, 2), indices, eye, bias)[:, 0]
    rounded = values.to(torch.bfloat16).float().reshape(24, 2)
    torch.testing.assert_close(y, torch.nn.functional.gelu(rounded + 10), rtol=1e-6, atol=1e-6)
    nan = torch.zeros(20, 2)
    nan[3, 1] = float("nan")
    assert view_scoring(nan, indices, eye, bias).isnan().any(2).squeeze(1).nonzero().tolist() == [[3]]


def test_what_it_cannot_do_is_refused() -> None:
    x, *rest = draw("narrow", 4)
    with pytest.raises(ValueError, match=r"no gradients: use it under torch\.no_grad"):
        view_scoring(x.requires_grad_(), *rest, EPS)
    with torch.no_grad():
        view_scoring(x, *rest, EPS)
    x = x.detach()
    with pytest.raises((ValueError, RuntimeError), match="index 99"):
        view_scoring(x, rest[0].clone().fill_(99), *rest[1:], EPS)
    with pytest.raises(ValueError, match="bias"):
        view_scoring(x, *rest[:2], rest[2][:1], *rest[3:], EPS)
    with pytest.raises(ValueError, match=r"residual=True adds N dims to d: weight_t \(2, 7, 5\)"):
        view_scoring(*draw("odd", 4), EPS, residual=True)
