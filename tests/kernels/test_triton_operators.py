"""The Triton kernels behind torch's operators: registered for this device, called through ``ssr_rec.kernels``."""

import pytest
import torch

from ssr_rec.kernels import devices, ics, ics_reference
from tests.triton_device import DEVICE, needs_triton

pytestmark = needs_triton
triton_ics = pytest.importorskip("ssr_rec.kernels.triton_ics")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Triton in the place of the C++ forms, where this device is the CPU; ``calls`` counts what it is asked for."""
    calls = []

    def counted(name, function):
        return lambda *args: calls.append(name) or function(*args)

    for name, function in list(triton_ics.OPERATORS.items()):
        monkeypatch.setitem(triton_ics.OPERATORS, name, counted(name, function))
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
    assert set(registered) == {"ics_forward", "ics_backward"}
