"""Triton kernels on a machine without a GPU: run in the interpreter, and compiled for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_device import INTERPRETED

FILES = sorted(Path(__file__).parent.glob("test_triton_*.py"))
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    summary = result.stdout.splitlines()[-1] if "passed" in result.stdout else ""
    print(summary)
