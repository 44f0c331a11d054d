"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter on the CPU.

Triton asks for TRITON_INTERPRET when it is first imported, so tests/kernels/test_triton.py runs the files that import
this one again in a process of its own, where that is set. Elsewhere they need a GPU.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="neither a GPU nor the interpreter")
needs_triton = [] if INTERPRETED else [pytest.mark.gpu, no_gpu]
