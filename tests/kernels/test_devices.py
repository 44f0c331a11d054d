"""Which tensors go to the operators, and what happens where a device lacks something."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from ssr_rec.kernels import devices, extension, view_fusion
from tests.triton_device import INTERPRETED

FORMS = sys.modules[view_fusion.__module__]


@pytest.fixture
def no_triton(monkeypatch):
    """A GPU's machine with a C++ compiler, on which nothing of Triton can be imported."""
    devices.register_triton.cache_clear()
    monkeypatch.setattr(extension, "load", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("ssr_rec.kernels.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("triton_ics", "triton_view_fusion"):
        monkeypatch.delattr(sys.modules["ssr_rec.kernels"], name, raising=False)
    yield
    devices.register_triton.cache_clear()


def test_a_device_of_another_kind_has_none():
    assert not devices.has_operators("meta") and not devices.has_operators("xpu")


@pytest.mark.parametrize("loads", [True, False])
def test_the_cpus_are_the_c_plus_plus_ones(loads, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: loads)
    assert devices.has_operators("cpu") is loads


def test_without_triton_one_warning_says_so(no_triton, monkeypatch):
    with pytest.warns(RuntimeWarning, match="plain, slower operators: .*triton") as caught:
        assert not devices.has_operators("cuda")
        assert not devices.has_operators("cuda")
    assert len(caught) == 1
    devices.register_triton.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not devices.has_operators("cuda")


def test_without_the_library_there_is_nothing_to_register(monkeypatch):
    devices.register_triton.cache_clear()
    monkeypatch.setattr(extension, "load", lambda: False)
    assert not devices.has_operators("cuda")
    devices.register_triton.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's process registers for the CPU")
def test_triton_is_registered_for_cuda_alone():
    pytest.importorskip("triton")
    if not extension.load():
        pytest.skip("no C++ compiler")
    assert devices.has_operators("cuda")
    for name in ("ics_forward", "ics_backward", "view_fusion_forward", "view_fusion_backward"):
        registered = torch._C._dispatch_dump(f"ssr_rec::{name}")
        assert "CUDA: registered at" in registered and "devices.py" in registered
        assert any("CPU: registered at" in line and ".cpp" in line for line in registered.splitlines())


@pytest.mark.parametrize(
    ("device", "x", "residual", "parameters", "has"),
    [
        ("cpu", "float32", None, {"float32"}, True),
        ("cpu", "float64", "float64", {"float64"}, True),
        ("cpu", "float32", None, {"float64"}, False),
        ("cpu", "bfloat16", None, {"bfloat16"}, False),
        ("cuda", "bfloat16", "bfloat16", {"float32"}, True),
        ("cuda", "float16", None, {"float16"}, True),
        ("cuda", "bfloat16", "float32", {"float32"}, False),
        ("cuda", "float32", None, {"float32"}, True),
        ("cuda", "float64", None, {"float32"}, False),
        ("cuda", "bfloat16", None, {"float32", "bfloat16"}, False),
        ("cuda", "int64", None, {"float32"}, False),
        ("meta", "float32", None, {"float32"}, False),
    ],
)
def test_types_that_have_a_form(device, x, residual, parameters, has):
    def tensor(kind):
        return kind and SimpleNamespace(dtype=getattr(torch, kind), device=SimpleNamespace(type=device))

    assert FORMS._has_form(tensor(x), tensor(residual), {getattr(torch, kind) for kind in parameters}) is has
