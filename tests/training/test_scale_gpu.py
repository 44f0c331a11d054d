"""What only a GPU shows of the scale controls: tables in host memory, prefetching, TF32, bf16 between ranks."""

import numpy as np
import pytest
import torch

from tests.checkpointing.test_resume import losses, options
from tests.jobs import train_job
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CACHED = "--sharding.kernels=[fused_uvm_caching]"


def trained(dataset, runs, ranks: int, *more: str) -> np.ndarray:
    run_ranks(train_job, ranks, options(dataset, runs, "--device=cuda", *more))
    return losses(runs)


@pytest.mark.parametrize(
    "more",
    [
        ["--sharding.kernels=[fused_uvm]"],
        [CACHED, "--sharding.cache_load_factor=0.2"],
        [CACHED, "--sharding.cache_load_factor=0.2", "--train.pipeline=prefetch"],
        [CACHED, "--train.pipeline=prefetch", "--train.accumulate=4"],
    ],
)
def test_where_the_tables_are_does_not_change_the_losses(dataset, tmp_path, more):
    accumulates = [option for option in more if "accumulate" in option]
    on_device = trained(dataset, tmp_path / "device", 1, *accumulates)
    assert np.abs(trained(dataset, tmp_path / "host", 1, *more) - on_device).max() < 1e-5


def test_tf32_rounds_matrix_products_a_little(dataset, tmp_path):
    exact, rounded = (trained(dataset, tmp_path / flag, 1, f"--train.tf32={flag}") for flag in ("false", "true"))
    assert 0 < np.abs(exact - rounded)[0] < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("types", ["[table_wise]", "[row_wise]"])
def test_bf16_between_ranks_stays_close(dataset, tmp_path, types):
    sharding = [f"--sharding.types={types}"]
    exact = trained(dataset, tmp_path / "fp32", 2, *sharding)
    rounded = trained(dataset, tmp_path / "bf16", 2, *sharding, "--sharding.qcomms={forward: bf16, backward: bf16}")
    assert 0 < np.abs(exact - rounded)[0] < 1e-2 and np.abs(exact - rounded).max() < 0.05
