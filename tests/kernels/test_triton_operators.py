"""The Triton kernels behind torch's operators: registered for this device, called through ``ssr_rec.kernels``."""

import pytest
import torch

from ssr_rec.kernels import devices, ics, view_fusion
from ssr_rec.kernels.reference import ics_reference, view_fusion_reference
from tests.triton_device import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton
triton_ics = pytest.importorskip("ssr_rec.kernels.triton_ics")
triton_view_fusion = pytest.importorskip("ssr_rec.kernels.triton_view_fusion")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Triton in the place of the C++ forms, where this device is the CPU; ``calls`` counts what it is asked for."""
    calls = []

    def counted(name, function):
        return lambda *args: calls.append(name) or function(*args)

    for module in (triton_ics, triton_view_fusion):
        for name, function in list(module.OPERATORS.items()):
            monkeypatch.setitem(module.OPERATORS, name, counted(name, function))
    devices.register_triton.cache_clear()
    if devices.register_triton(DEVICE.type.upper()) is None:
        pytest.skip("no C++ compiler")
    yield calls
    devices.register_triton.cache_clear()


def inputs(gamma: bool = True) -> tuple[torch.Tensor | None, ...]:
    torch.manual_seed(0)
    z = torch.randn(5, 2, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    alpha = (torch.rand(2, 3, dtype=torch.float64, device=DEVICE) - 0.4).requires_grad_()
    scale = torch.randn(2, 6, dtype=torch.float64, device=DEVICE, requires_grad=True) if gamma else None
    return z, alpha, scale


@pytest.mark.parametrize("gamma", [True, False], ids=["gamma", "no gamma"])
def test_ics_goes_through_triton(registered, gamma):
    given = inputs(gamma)
    wanted = [x for x in given if x is not None]
    y = ics(*given)
    expected = ics_reference(*given)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, upstream))
    assert registered == ["ics_forward", "ics_backward"]


def test_ics_compiles_with_its_kernels_as_they_are(registered):
    given = inputs()
    upstream = torch.randn_like(given[0])
    compiled = torch.compile(ics, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given), given, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(ics_reference(*given), given, upstream))
    assert registered == ["ics_forward", "ics_backward"]


def test_the_operators_keep_torchs_rules(registered):
    z, alpha, gamma = (x.detach() for x in inputs())
    torch.library.opcheck(torch.ops.ssr_rec.ics_forward.default, (z, alpha, gamma))
    _, means = torch.ops.ssr_rec.ics_forward(z, alpha, gamma)
    torch.library.opcheck(torch.ops.ssr_rec.ics_backward.default, (z, z, means, alpha, gamma))
    torch.library.opcheck(torch.ops.ssr_rec.ics_backward.default, (z, z, means, alpha, None))
    rough = z.bfloat16()
    torch.library.opcheck(torch.ops.ssr_rec.ics_backward.default, (rough, rough, means.float(), alpha.float(), None))
    assert set(registered) == {"ics_forward", "ics_backward"}


def fusion_inputs(static: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()

    indices = torch.tensor([[0, 2, 3], [1, 2, 6]], device=DEVICE) if static else None
    residual = None if static else normal(5, 2, 4)
    parameters = [normal(2, 3, 4), normal(2, 4), residual, normal(2, 4), normal(2, 4)]
    return [normal(5, 7) if static else normal(5, 2, 3), indices, *parameters]


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic residual"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_view_fusion_goes_through_triton(registered, static, compiled):
    given = fusion_inputs(static)
    wanted = [x for x in given if x is not None and x.is_floating_point()]
    function = torch.compile(view_fusion, fullgraph=True, backend="aot_eager") if compiled else view_fusion
    y, expected = function(*given, 1e-3), view_fusion_reference(*given, 1e-3)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, upstream))
    assert registered == ["view_fusion_forward", "view_fusion_backward"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic residual"])
def test_the_fusion_operators_keep_torchs_rules(static, dtype):
    given = [x.detach() if x is not None else None for x in fusion_inputs(static)]
    if dtype == torch.bfloat16:
        # The shapes and types alone: the interpreter has no product in bfloat16.
        types = [dtype if i in (0, 4) else torch.int64 if i == 1 else torch.float32 for i in range(7)]
        given = [None if x is None else x.to(kind) for x, kind in zip(given, types, strict=True)]
    x, indices, weight, bias, residual, scale, _ = given
    forward = torch.ops.ssr_rec.view_fusion_forward.default
    rules = ("test_schema", "test_faketensor")
    for save in (True, False):
        torch.library.opcheck(forward, (*given, 1e-3, save), test_utils=rules)
    y, pre, stats = forward(*given, 1e-3, True)
    for need_x in (True, False):
        arguments = (y, x, indices, weight, bias, residual, scale, pre, stats, need_x)
        torch.library.opcheck(torch.ops.ssr_rec.view_fusion_backward.default, arguments, test_utils=rules)


@pytest.mark.skipif(INTERPRETED, reason="the autocast of a GPU")
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic residual"])
def test_autocast_on_a_gpu(registered, static):
    given = [x.detach().float() if x is not None and x.is_floating_point() else x for x in fusion_inputs(static)]
    with torch.autocast("cuda", torch.bfloat16):
        y = view_fusion(*given, 1e-3)
    assert y.dtype == torch.bfloat16 and registered == ["view_fusion_forward"]
    wanted = view_fusion_reference(*given, 1e-3)
    assert (y.float() - wanted).norm() <= 2**-5 * wanted.norm()
