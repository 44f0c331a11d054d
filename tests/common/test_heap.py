"""Freed memory is used again: counted in page faults, in processes of their own."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from ssr_rec.common.heap import keep_freed_memory
{call}
def step():
    for _ in range(10):
        torch.ones(4_000_000)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")
def test_a_block_of_megabytes_costs_its_page_faults_once() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, check=True).stdout)
        for call in ("keep_freed_memory()", "")
    )
    # 16 MB are 3,906 pages; where the kernel gives large ones, there is nothing to keep.
    assert kept <= 50 and (returned > 1_000 or returned <= 200)
