"""The Triton form of ICS against Algorithm 1 in plain loops and against autograd of the plain form."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssr_rec.kernels.reference import ics_reference
from tests.triton_device import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton
triton_ics = pytest.importorskip("ssr_rec.kernels.triton_ics")

SHAPES = [(5, 3, 8, 5), (20, 1, 100, 3), (3, 1, 1, 2), (9, 2, 16, 0), (2, 1, 1500, 2), (17, 1, 33, 7)]
"""B, V, d, T: widths below, at and between powers of two, more rows than a tile and more columns."""
ALPHAS = {"positive": (0.0, 0.5), "negative": (-0.5, 0.0), "any": (-0.3, 0.3), "large": (0.5, 2.5)}


class TritonIcs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, alpha, gamma):
        y, means = triton_ics.ics_forward(z, alpha, gamma)
        ctx.save_for_backward(z, means, alpha, gamma)
        return y

    @staticmethod
    def backward(ctx, grad):
        z, means, alpha, gamma = ctx.saved_tensors
        *grads, grad_gamma = triton_ics.ics_backward(grad, z, means, alpha, gamma)
        return *grads, None if gamma is None else grad_gamma


def draw(shape, signs="any", gamma=True, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor | None]:
    """z, alpha and gamma. Every view has an alpha of zero; "any" has views of both kinds."""
    batch, views, dim, iterations = shape
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, views, dim, generator=generator, dtype=torch.float64)
    low, high = ALPHAS[signs]
    alpha = low + (high - low) * torch.rand(views, iterations, generator=generator, dtype=torch.float64)
    if signs == "any":
        alpha[0] = alpha[0].abs()
    alpha[:, 2:3] = 0
    scale = torch.randn(views, dim, generator=generator, dtype=torch.float64) if gamma else None
    parts = (z, alpha, scale)
    return tuple(None if p is None else p.to(DEVICE, dtype).requires_grad_() for p in parts)


def plain_loop(z: np.ndarray, alpha: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 element by element, and the means it meets."""
    y, means = np.zeros_like(z), np.zeros((*z.shape[:2], alpha.shape[1]))
    for row in range(z.shape[0]):
        for view in range(z.shape[1]):
            x = [max(value, 0.0) for value in z[row, view]]
            for t, rate in enumerate(alpha[view]):
                means[row, view, t] = sum(x) / len(x)
                x = [max(value - rate * means[row, view, t], 0.0) for value in x]
            y[row, view] = [scale * value for scale, value in zip(gamma[view], x, strict=True)]
    return y, means


def gradients(function, inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    wanted = [x for x in inputs if x is not None]
    found = torch.autograd.grad(function(*inputs), wanted, upstream, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))


@pytest.mark.parametrize("signs", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_algorithm_1(shape, signs):
    z, alpha, gamma = (x.detach() for x in draw(shape, signs))
    y, means = triton_ics.ics_forward(z, alpha, gamma)
    expected = plain_loop(*(x.cpu().numpy() for x in (z, alpha, gamma)))
    for found, wanted in zip((y, means), expected, strict=True):
        torch.testing.assert_close(found.cpu(), torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)
    # With every alpha at least zero, what lost stays exactly zero.
    if signs == "positive":
        assert (y == 0).sum() >= (z <= 0).sum()


@pytest.mark.parametrize(("signs", "gamma"), [*((signs, True) for signs in ALPHAS), ("any", False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_plain_form(shape, signs, gamma):
    inputs = draw(shape, signs, gamma)
    upstream = torch.randn_like(inputs[0])
    found = gradients(TritonIcs.apply, inputs, upstream)
    torch.testing.assert_close(found, gradients(ics_reference, inputs, upstream), rtol=1e-9, atol=1e-11)
    (_, _, grad_gamma) = triton_ics.ics_backward(
        upstream, inputs[0].detach(), triton_ics.ics_forward(*inputs)[1], *(inputs[1:])
    )
    assert grad_gamma.shape == (shape[1:3] if gamma else (0,))


@pytest.mark.parametrize("signs", ["positive", "negative", "any"])
def test_gradcheck(signs):
    inputs = draw((4, 2, 5, 3), signs, seed=3)
    with torch.no_grad():
        # Dead dims make a kink of an alpha of zero.
        inputs[1][:, 2] = 0.2
    assert torch.autograd.gradcheck(TritonIcs.apply, inputs, fast_mode=True)


@pytest.mark.parametrize("signs", ["positive", "any"])
def test_float32_agrees_to_1e_5(signs):
    inputs = draw((16, 2, 128, 5), signs, dtype=torch.float32)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    upstream = torch.randn_like(inputs[0])
    torch.testing.assert_close(TritonIcs.apply(*inputs).double(), ics_reference(*exact), rtol=1e-5, atol=1e-5)
    pairs = zip(
        gradients(TritonIcs.apply, inputs, upstream), gradients(ics_reference, exact, upstream.double()), strict=True
    )
    for found, wanted in pairs:
        # Entries a rounding away from their threshold fall on either side of it; they are few.
        assert found.dtype == torch.float32
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_bfloat16_is_rounded_once():
    z, alpha, gamma = draw((16, 2, 128, 5), "any", dtype=torch.float32)
    rough = z.detach().bfloat16().requires_grad_()
    exact = rough.detach().float().requires_grad_()
    y, means = triton_ics.ics_forward(rough, alpha, gamma)
    assert y.dtype == torch.bfloat16 and means.dtype == torch.float32
    # Half a unit in the last of 8 places; the interpreter cuts off instead of rounding.
    unit = 2**-7 if INTERPRETED else 2**-8
    torch.testing.assert_close(y.float(), ics_reference(exact, alpha, gamma), rtol=unit, atol=1e-6)
    upstream = torch.randn_like(y)
    found = gradients(TritonIcs.apply, (rough, alpha, gamma), upstream)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
    wanted = gradients(ics_reference, (exact, alpha, gamma), upstream.float())
    for one, other, tolerance in zip(found, wanted, (unit, 1e-5, 1e-5), strict=True):
        assert (one.float() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("signs", ["positive", "any"])
def test_rows_without_anything_positive_ties_and_constants(signs):
    z, alpha, gamma = (x.detach().requires_grad_() for x in draw((6, 2, 7, 4), signs))
    with torch.no_grad():
        z[0], z[1], z[2] = 0.0, -1.0, 2.0
        z[3, :, :4] = 0.25
        z[4, :, 1:] = -0.0
    torch.testing.assert_close(TritonIcs.apply(z, alpha, gamma), ics_reference(z, alpha, gamma))
    upstream = torch.randn_like(z)
    found, wanted = (gradients(f, (z, alpha, gamma), upstream) for f in (TritonIcs.apply, ics_reference))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("signs", ["positive", "any"])
def test_infinity_and_nan_go_where_the_plain_form_takes_them(signs):
    z, alpha, gamma = (x.detach().requires_grad_() for x in draw((5, 2, 6, 3), signs))
    with torch.no_grad():
        z[0, :, 1], z[1, :, 2], z[2, :, 3] = torch.nan, torch.inf, -torch.inf
    found, wanted = TritonIcs.apply(z, alpha, gamma), ics_reference(z, alpha, gamma)
    assert wanted.isnan().any() and not wanted[3:].isnan().any()
    torch.testing.assert_close(found, wanted, equal_nan=True)
    upstream = torch.randn_like(z)
    pairs = zip(*(gradients(f, (z, alpha, gamma), upstream) for f in (TritonIcs.apply, ics_reference)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, equal_nan=True)


def test_a_nan_alpha_is_the_plain_forms_too():
    z, alpha, gamma = (x.detach() for x in draw((3, 2, 6, 3), "positive"))
    alpha[1, 1] = torch.nan
    found = triton_ics.ics_forward(z, alpha, gamma)[0]
    torch.testing.assert_close(found, ics_reference(z, alpha, gamma), equal_nan=True)


def test_any_strides():
    shape = (10, 3, 8, 3)
    z, alpha, gamma = draw(shape)
    upstream = torch.randn_like(z)
    wanted = triton_ics.ics_forward(z, alpha, gamma)
    grads = triton_ics.ics_backward(upstream, z, wanted[1], alpha, gamma)
    # Views first, dims first, and a projection's slice; as alpha, a column of something wider.
    wide = torch.randn(10, 3, 20, device=DEVICE, dtype=z.dtype)
    wide[..., 3:11] = z.detach()
    for other in (z.transpose(0, 1).contiguous().transpose(0, 1), z.mT.contiguous().mT, wide[..., 3:11]):
        flipped = alpha.detach().t().contiguous().t()
        assert not other.is_contiguous() and torch.equal(other, z) and not flipped.is_contiguous()
        # A GPU's compiler orders sums by the strides.
        bound = 0.0 if INTERPRETED else 1e-12
        close = {"rtol": bound, "atol": bound}
        torch.testing.assert_close(triton_ics.ics_forward(other, flipped, gamma), wanted, **close)
        g = upstream.transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(triton_ics.ics_backward(g, other, wanted[1], flipped, gamma), grads, **close)
    ones = torch.ones((), device=DEVICE, dtype=z.dtype).expand(z.shape)
    of_ones = triton_ics.ics_backward(ones, z, wanted[1], alpha, gamma)
    assert all(map(torch.equal, of_ones, triton_ics.ics_backward(ones.contiguous(), z, wanted[1], alpha, gamma)))


@pytest.mark.parametrize("signs", ["positive", "any"])
def test_parts_of_the_batch_add_up(signs, monkeypatch):
    """Programs that sum over one tile or over many, with tiles at the end that are not full."""
    inputs = draw((11, 2, 7, 2), signs)
    upstream = torch.randn_like(inputs[0])
    wanted = gradients(ics_reference, inputs, upstream)
    for tile, programs in ((16, 4), (32, 2), (1024, 2048)):
        monkeypatch.setattr(triton_ics, "TILE", tile)
        monkeypatch.setattr(triton_ics, "PROGRAMS", programs)
        torch.testing.assert_close(gradients(TritonIcs.apply, inputs, upstream), wanted)
    assert all(map(torch.equal, *(gradients(TritonIcs.apply, inputs, upstream) for _ in range(2))))


@torch.no_grad()
def test_offsets_of_more_than_32_bits():
    """Views that lie 2^30 numbers apart; the memory between them is never touched."""
    z, alpha, gamma = draw((3, 3, 8, 2), dtype=torch.float32)
    z, apart = z.detach().bfloat16(), 2**30
    memory = torch.empty(2 * apart + z.numel(), dtype=z.dtype, device=DEVICE)
    far = memory.as_strided(z.shape, (8, apart, 1)).copy_(z)
    _, means = wanted = triton_ics.ics_forward(z, alpha, gamma)
    assert all(map(torch.equal, triton_ics.ics_forward(far, alpha, gamma), wanted))
    grads = triton_ics.ics_backward(z, z, means, alpha, gamma)
    assert all(map(torch.equal, triton_ics.ics_backward(far, far, means, alpha, gamma), grads))


def test_an_empty_batch():
    z, alpha, gamma = draw((0, 2, 8, 3))
    y, means = triton_ics.ics_forward(z, alpha, gamma)
    assert y.shape == (0, 2, 8) and means.shape == (0, 2, 3)
    grads = triton_ics.ics_backward(y, z, means, alpha, gamma)
    assert [g.shape for g in grads] == [(0, 2, 8), (2, 3), (2, 8)]
    assert not any(g.any() for g in grads)
