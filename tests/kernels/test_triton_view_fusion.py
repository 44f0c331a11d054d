"""The Triton form of filter-and-fuse against the plain form, in plain loops and by autograd."""

import math

import pytest
import torch
from torch import Tensor

from ssr_rec.kernels.reference import view_fusion_reference
from tests.triton_device import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton
fusion = pytest.importorskip("ssr_rec.kernels.triton_view_fusion")

EPS = 1e-3
FORMS = {
    "static": {"indices": True, "norm": True, "residual": False},
    "static residual": {"indices": True, "norm": True, "residual": True},
    "dynamic": {"indices": False, "norm": True, "residual": False},
    "dynamic residual": {"indices": False, "norm": True, "residual": True},
    "first of two layers": {"indices": True, "norm": False, "residual": False},
    "second of two layers": {"indices": False, "norm": True, "residual": True},
    "neither": {"indices": False, "norm": False, "residual": False},
}
# The interpreter's tl.dot multiplies the bits of a bfloat16.
FUSED_TYPE = torch.float16 if INTERPRETED else torch.bfloat16
SHAPES = [(5, 3, 8, 8), (17, 2, 12, 20), (3, 1, 1, 1), (2, 2, 40, 5)]
"""B, V, N, d."""


class TritonFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, weight, bias, residual, scale, shift, eps, *kept):
        y, pre, stats = fusion.view_fusion_forward(x, indices, weight, bias, residual, scale, shift, eps, True, *kept)
        ctx.save_for_backward(x, indices, weight, bias, residual, scale, pre, stats)
        ctx.kept = kept
        return y

    @staticmethod
    def backward(ctx, grad):
        of_x, *rest = fusion.view_fusion_backward(grad, *ctx.saved_tensors, True, *ctx.kept)
        wanted = (g if need else None for g, need in zip(rest, ctx.needs_input_grad[2:], strict=False))
        return of_x, None, *wanted, None, *(None for _ in ctx.kept)


def draw(shape, form, dtype=torch.float64, seed=0) -> list[Tensor | None]:
    """x, indices, weight, bias, residual, scale, shift; views overlap, and some of x's dims are in none."""
    batch, views, inner, dim = shape
    form = FORMS[form]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()

    width = 2 * inner + 3
    indices = torch.stack([torch.randperm(width, generator=generator)[:inner].sort().values for _ in range(views)])
    x = normal(batch, width) if form["indices"] else normal(batch, views, inner)
    return [
        x,
        indices.to(DEVICE) if form["indices"] else None,
        normal(views, inner, dim),
        normal(views, dim),
        normal(batch, views, dim) if form["residual"] else None,
        *((normal(views, dim), normal(views, dim)) if form["norm"] else (None, None)),
    ]


def gradients(function, inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    wanted = [x for x in inputs if x is not None and x.is_floating_point()]
    return torch.autograd.grad(function(*inputs, EPS), wanted, upstream)


def plain_loop(x, indices, weight, bias, residual, scale, shift) -> Tensor:
    """Equations 3, 5 and 6 with the released code's variants, number by number."""
    views, inner, dim = weight.shape
    y = torch.zeros(x.shape[0], views, dim, dtype=torch.float64)
    for b in range(x.shape[0]):
        for v in range(views):
            h = [x[b, v, n] if indices is None else x[b, indices[v, n]] for n in range(inner)]
            s = []
            for j in range(dim):
                u = bias[v, j].item() + math.fsum((h[n] * weight[v, n, j]).item() for n in range(inner))
                s.append(
                    u * 0.5 * math.erfc(-u / math.sqrt(2)) + (0.0 if residual is None else residual[b, v, j].item())
                )
            if scale is not None:
                mean = math.fsum(s) / dim
                deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in s) / dim + EPS)
                s = [scale[v, j].item() * (s[j] - mean) / deviation + shift[v, j].item() for j in range(dim)]
            y[b, v] = torch.tensor(s, dtype=torch.float64)
    return y


@pytest.mark.parametrize("form", FORMS)
def test_values_number_by_number(form):
    inputs = [None if x is None else x.detach() for x in draw((3, 2, 5, 6), form)]
    y, pre, stats = fusion.view_fusion_forward(*inputs, EPS, True)
    expected = plain_loop(*(None if x is None else x.cpu() for x in inputs))
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-9, atol=1e-9)
    assert pre.shape == (2, 3, 6) and stats.shape == ((2, 3, 2) if FORMS[form]["norm"] else (0,))
    lean, *kept = fusion.view_fusion_forward(*inputs, EPS, False)
    assert torch.equal(lean, y) and [k.shape for k in kept] == [(0,), (0,)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_plain_form(shape, form):
    if FORMS[form]["residual"] and shape[3] == 1:
        pytest.skip("the norm of one dim is its shift: no gradient to compare")
    inputs = draw(shape, form)
    upstream = torch.randn(shape[0], shape[1], shape[3], device=DEVICE, dtype=torch.float64)
    torch.testing.assert_close(TritonFusion.apply(*inputs, EPS), view_fusion_reference(*inputs, EPS))
    found = gradients(TritonFusion.apply, inputs, upstream)
    torch.testing.assert_close(found, gradients(view_fusion_reference, inputs, upstream))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, FUSED_TYPE])
def test_dropout(form, dtype):
    inputs = draw((17, 2, 12, 20), form, dtype)
    upstream = torch.randn(17, 2, 20, device=DEVICE).to(dtype)
    # Rows of views first, to be turned.
    keep = (torch.rand(2, 17, 20, device=DEVICE) < 0.7).transpose(0, 1)

    def with_dropout(function):
        return lambda *given: function(*given, keep, 0.7)

    ours, plain = with_dropout(TritonFusion.apply), with_dropout(view_fusion_reference)
    exact = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    found = (ours(*inputs, EPS), *gradients(ours, inputs, upstream))
    wanted = (plain(*exact, EPS), *gradients(plain, exact, upstream.double()))
    unit = 10 * torch.finfo(dtype).eps
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype and (one.double() - other).norm() <= unit * other.norm()
    if not FORMS[form]["norm"]:
        inputs[3].data[0, 3] = math.nan
        assert ours(*inputs, EPS)[:, 0, 3].isnan().all()
    if not FORMS[form]["residual"] and not FORMS[form]["norm"]:
        assert not found[0][~keep].any() and found[0][keep].any()


@pytest.mark.parametrize("form", ["static residual", "dynamic", "first of two layers"])
def test_gradcheck(form):
    assert torch.autograd.gradcheck(TritonFusion.apply, (*draw((4, 2, 3, 5), form, seed=1), EPS), fast_mode=True)


@pytest.mark.parametrize("form", ["static residual", "dynamic"])
def test_float32_agrees_to_1e_5(form):
    inputs = draw((16, 2, 64, 64), form, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    upstream = torch.randn(16, 2, 64, device=DEVICE)
    found = (TritonFusion.apply(*inputs, EPS), *gradients(TritonFusion.apply, inputs, upstream))
    wanted = (view_fusion_reference(*exact, EPS), *gradients(view_fusion_reference, exact, upstream.double()))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(70, 2, 40, 24), (3, 1, 5, 3)], ids=str)
def test_16_bits_in_one_kernel(shape, form):
    """Activations of 16 bits and float32 parameters, as by autocast; N above and below one step of the product."""
    inputs = draw(shape, form, dtype=torch.float32)
    rough = [x.detach().to(FUSED_TYPE) if i in (0, 4) and x is not None else x for i, x in enumerate(inputs)]
    exact = [x.float() if i in (0, 4) and x is not None else x for i, x in enumerate(rough)]
    # The weight is rounded before the product, as by autocast.
    exact[2] = exact[2].detach().to(FUSED_TYPE).float()
    with torch.no_grad():
        y, pre, stats = fusion.view_fusion_forward(*rough, EPS, True)
        lean, *_ = fusion.view_fusion_forward(*rough, EPS, False)
    assert y.dtype == pre.dtype == FUSED_TYPE
    assert stats.dtype == (torch.float32 if FORMS[form]["norm"] else FUSED_TYPE)
    # What is saved changes the code that a GPU's compiler makes, and so perhaps the last bit.
    assert torch.equal(lean, y) if INTERPRETED else (lean - y).norm() <= torch.finfo(FUSED_TYPE).eps * y.norm()
    # What follows the product starts from what is saved, and is rounded once.
    z = torch.nn.functional.gelu(pre.float() + exact[3].detach()[:, None])
    z = z if exact[4] is None else z + exact[4].detach().transpose(0, 1)
    if FORMS[form]["norm"]:
        z = torch.nn.functional.layer_norm(z, z.shape[2:], eps=EPS) * exact[5][:, None] + exact[6][:, None]
    half = 0.51 * torch.finfo(FUSED_TYPE).eps
    torch.testing.assert_close(y.float(), z.transpose(0, 1).detach(), rtol=half, atol=1e-5)
    for x in (rough[0], rough[4], exact[0], exact[2], exact[4]):
        if x is not None:
            x.requires_grad_()
    wanted = view_fusion_reference(*exact, EPS)
    # The product and the result are rounded.
    unit = 2 * torch.finfo(FUSED_TYPE).eps
    assert (y.float() - wanted).norm() <= unit * wanted.norm()
    upstream = torch.randn_like(y)
    found = gradients(TritonFusion.apply, rough, upstream)
    for one, other in zip(found, gradients(view_fusion_reference, exact, upstream.float()), strict=True):
        assert (one.float() - other).norm() <= 4 * unit * other.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [FUSED_TYPE, torch.bfloat16])
def test_a_wide_view_in_16_bits_leaves_the_product_to_cublas(dtype, monkeypatch):
    inputs = draw((5, 2, 8, 8), "static", dtype=torch.float32)
    inputs[0] = inputs[0].to(dtype)
    monkeypatch.setattr(fusion, "WIDEST_FUSED", 7)
    monkeypatch.setattr(fusion, "launch_fused", None)
    y, pre, stats = fusion.view_fusion_forward(*inputs, EPS, True)
    assert y.dtype == pre.dtype == dtype and stats.dtype == torch.float32
    exact = [inputs[0].float(), inputs[1], inputs[2].to(dtype).float(), *inputs[3:]]
    wanted = view_fusion_reference(*exact, EPS)
    assert (y.float() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, FUSED_TYPE])
@pytest.mark.parametrize("form", ["static residual", "dynamic residual"])
def test_any_strides(form, dtype):
    inputs = draw((6, 2, 4, 4), form)
    inputs = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs]
    upstream = torch.randn(6, 2, 4, device=DEVICE).to(dtype)
    wanted = fusion.view_fusion_forward(*inputs, EPS, True)
    x, indices, weight, bias, residual, scale, _ = inputs
    grads = fusion.view_fusion_backward(upstream, x, indices, weight, bias, residual, scale, *wanted[1:], True)

    def turned(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.transpose(0, 1).contiguous().transpose(0, 1)

    others = [turned(x) for x in inputs]
    assert all(map(torch.equal, fusion.view_fusion_forward(*others, EPS, True), wanted))
    x, indices, weight, bias, residual, scale, _ = others
    again = fusion.view_fusion_backward(turned(upstream), x, indices, weight, bias, residual, scale, *wanted[1:], True)
    unit = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(again, grads, rtol=unit, atol=unit)
    ones = torch.ones((), device=DEVICE, dtype=dtype).expand(6, 2, 4)
    of_ones = [
        fusion.view_fusion_backward(g, x, indices, weight, bias, residual, scale, *wanted[1:], True)
        for g in (ones, ones.contiguous())
    ]
    assert all(map(torch.equal, *of_ones))


def test_what_nobody_asks_for_is_empty():
    x, indices, weight, bias, *_ = inputs = draw((4, 2, 3, 5), "first of two layers")
    _, pre, stats = fusion.view_fusion_forward(*inputs, EPS, True)
    grad = torch.randn(4, 2, 5, device=DEVICE, dtype=torch.float64)
    found = fusion.view_fusion_backward(grad, x, indices, weight, bias, None, None, pre, stats, False)
    assert [g.shape for g in found] == [(0,), weight.shape, bias.shape, (0,), (0,), (0,)]


def test_a_dim_that_a_view_sees_twice():
    inputs = draw((4, 2, 3, 5), "static")
    inputs[1] = torch.tensor([[1, 1, 4], [4, 0, 1]], device=DEVICE)
    upstream = torch.randn(4, 2, 5, device=DEVICE, dtype=torch.float64)
    found, wanted = (gradients(f, inputs, upstream) for f in (TritonFusion.apply, view_fusion_reference))
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, FUSED_TYPE])
@pytest.mark.parametrize("index", [-1, 7, 2**40])
def test_a_dim_that_x_does_not_have_is_nan(index, dtype):
    """A GPU does not say so before the step is over, and must not read what lies there."""
    inputs = draw((4, 2, 3, 5), "static", dtype=torch.float32)
    inputs[0] = inputs[0].detach()[:, :7].to(dtype)
    inputs[1] = torch.tensor([[1, 2, 4], [0, 3, 6]], device=DEVICE)
    sound = fusion.view_fusion_forward(*inputs, EPS, True)[0]
    inputs[1][1, 1] = index
    y = fusion.view_fusion_forward(*inputs, EPS, True)[0]
    assert torch.equal(y[:, 0], sound[:, 0]) and y[:, 1].isnan().all()


@torch.no_grad()
def test_offsets_of_more_than_32_bits():
    """Views that lie 2^30 numbers apart; the memory between them is never touched."""
    inputs = draw((3, 3, 8, 8), "dynamic", dtype=torch.float32)
    inputs[0] = inputs[0].detach().to(FUSED_TYPE)

    def spread(tensor: Tensor) -> Tensor:
        memory = torch.empty(2**31 + tensor.numel(), dtype=tensor.dtype, device=DEVICE)
        return memory.as_strided(tensor.shape, (8, 2**30, 1)).copy_(tensor)

    wanted = fusion.view_fusion_forward(*inputs, EPS, True)
    assert all(map(torch.equal, fusion.view_fusion_forward(spread(inputs[0]), *inputs[1:], EPS, True), wanted))
    grad = torch.randn(3, 3, 8, device=DEVICE).to(FUSED_TYPE)
    x, indices, weight, bias, residual, scale, _ = inputs
    near, far = (
        fusion.view_fusion_backward(g, x, indices, weight, bias, residual, scale, *wanted[1:], True)
        for g in (grad, spread(grad))
    )
    assert all(map(torch.equal, near, far))


def test_grids_have_one_axis(monkeypatch):
    """A GPU's others end at 65,535, which rows in tiles may pass."""
    grids = []

    class Launches:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in ("fused", "gather", "epilogue", "epilogue_backward", "sum_segments"):
        monkeypatch.setattr(fusion, name, Launches(getattr(fusion, name)))
    inputs = draw((70, 2, 20, 5), "static")
    upstream = torch.randn(70, 2, 5, device=DEVICE, dtype=torch.float64)
    found, wanted = (gradients(f, inputs, upstream) for f in (TritonFusion.apply, view_fusion_reference))
    torch.testing.assert_close(found, wanted)
    assert len(grids) == 5 and {len(grid) for grid in grids} == {1}


def test_parts_of_the_batch_add_up(monkeypatch):
    inputs = draw((11, 2, 3, 5), "static residual")
    upstream = torch.randn(11, 2, 5, device=DEVICE, dtype=torch.float64)
    wanted = gradients(view_fusion_reference, inputs, upstream)
    for rows, programs in ((1, 6), (2, 4), (4, 2)):
        monkeypatch.setattr(fusion, "tile_of", lambda dim, rows=rows: (rows, 8))
        monkeypatch.setattr(fusion, "PROGRAMS", programs)
        torch.testing.assert_close(gradients(TritonFusion.apply, inputs, upstream), wanted)
    assert all(map(torch.equal, *(gradients(TritonFusion.apply, inputs, upstream) for _ in range(2))))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, FUSED_TYPE])
@pytest.mark.parametrize("form", ["static residual", "dynamic"])
def test_an_empty_batch(form, dtype):
    inputs = draw((0, 2, 4, 4), form, dtype=torch.float32)
    inputs[0] = inputs[0].detach().to(dtype)
    y, pre, stats = fusion.view_fusion_forward(*inputs, EPS, True)
    assert y.shape == (0, 2, 4) and pre.shape == (2, 0, 4) and stats.shape == (2, 0, 2)
    x, indices, weight, bias, residual, scale, _ = inputs
    found = fusion.view_fusion_backward(y, x, indices, weight, bias, residual, scale, pre, stats, True)
    shapes = [x.shape, weight.shape, bias.shape, (0,) if residual is None else residual.shape, bias.shape, bias.shape]
    assert [g.shape for g in found] == shapes
    assert not any(g.any() for g in found)
