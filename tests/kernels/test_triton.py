"""Triton kernels on a machine without a GPU: run in the interpreter, and compiled for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.triton_device import INTERPRETED

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("test_triton_*.py"))

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and ".." in result.stdout, result.stdout[-3000:]


class Launches:
    """In the place of a kernel: compiles what would be launched."""

    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.log.append(self.kernel.warmup(*args, grid=grid, **kwargs))


@pytest.fixture(params=[80, 90], ids=["A100", "H100"])
def gpu(request, tmp_path, monkeypatch):
    """Triton believes that this GPU is there. Nothing is loaded, so nothing can run."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", request.param, 32)
    # A device's number is the key of what a kernel has compiled for it.
    fake = SimpleNamespace(
        get_current_device=lambda: request.param,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return target


def compiled(module, names, monkeypatch) -> list:
    log = []
    for name in names:
        monkeypatch.setattr(module, name, Launches(getattr(module, name), log))
    return log


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [True, False], ids=["gamma", "no gamma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_ics_compiles(gpu, dtype, gamma, monkeypatch):
    from ssr_rec.kernels import triton_ics

    log = compiled(triton_ics, ["_forward", "_backward"], monkeypatch)
    z, alpha = torch.randn(64, 8, 128).to(dtype), torch.rand(8, 5)
    scale = torch.ones(8, 128) if gamma else None
    _, means = triton_ics.ics_forward(z, alpha, scale)
    triton_ics.ics_backward(z, z, means, alpha, scale)
    assert [kernel.metadata.name for kernel in log] == ["_forward", "_backward"]
    assert all(kernel.asm["cubin"] for kernel in log)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["static", "dynamic residual dropout", "neither"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_view_fusion_compiles(gpu, dtype, form, monkeypatch):
    from ssr_rec.kernels import triton_view_fusion as fusion

    names = ["fused", "gather", "epilogue", "epilogue_backward", "sum_segments"]
    log = compiled(fusion, names, monkeypatch)
    views, dim = 4, 128
    indices = torch.stack([torch.randperm(512)[:dim].sort().values for _ in range(views)]) if form == "static" else None
    x = torch.randn(64, *((512,) if form == "static" else (views, dim))).to(dtype)
    weight, bias = torch.randn(views, dim, dim), torch.randn(views, dim)
    residual, kept = None, ()
    if form == "dynamic residual dropout":
        residual, kept = x, (torch.rand(x.shape) < 0.8, 0.8)
    scale = None if form == "neither" else bias
    y, pre, stats = fusion.view_fusion_forward(x, indices, weight, bias, residual, scale, scale, 1e-6, True, *kept)
    fusion.view_fusion_backward(y, x, indices, weight, bias, residual, scale, pre, stats, True, *kept)
    forward = ["fused"] if dtype.itemsize == 2 else ["gather", "epilogue"] if form == "static" else ["epilogue"]
    backward = ["epilogue_backward", *(["gather", "sum_segments"] if form == "static" else [])]
    assert [kernel.metadata.name for kernel in log] == forward + backward
    assert all(kernel.asm["cubin"] for kernel in log)
