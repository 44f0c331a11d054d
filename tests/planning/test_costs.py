"""Bytes and operations against counting them another way."""

import pytest
import torch
from torchrec.distributed.planner.types import CollectiveType

from ssr_rec.over_archs.registry import OVER_ARCHS
from ssr_rec.planning.costs import Links, dense_cost, gemm_precision, shard_bytes, state_bytes
from ssr_rec.planning.hardware import load_hardware
from tests.planning.small import make_case


def test_a_dense_part_is_counted_as_it_is() -> None:
    """A plain MLP by hand: 3 features x 16, 32 ReLU units, one head."""
    cost = dense_cost(make_case({"a": 9, "b": 9, "c": 9}, []))
    assert cost.parameters == 48 * 32 + 32 + 32 + 1
    assert cost.matmul_flops == 2 * (48 * 32 + 32)
    # Kept for the backward pass: the input, and the ReLU's output, which the head keeps too.
    assert cost.activation_bytes == 4 * (48 + 32)
    assert cost.fixed_bytes == 0


@pytest.mark.parametrize("name", [*OVER_ARCHS])
def test_every_over_arch_can_be_counted(name: str) -> None:
    """Against the tensors that autograd really keeps of the real over-arch, by their storages."""
    case = make_case(dict.fromkeys("abcdefgh", 9), [f"--over_arch={{name: {name}}}"])
    cost = dense_cost(case)
    over_arch = OVER_ARCHS[name](8, 16, 1, case.config.over_arch)  # type: ignore[call-arg]
    heads = over_arch.out_features + 1
    assert cost.parameters == over_arch.num_parameters + heads
    assert cost.activation_bytes >= 4 * 8 * 16  # at least the input
    assert cost.matmul_flops == over_arch.flops().matmul + 2 * over_arch.out_features


def test_a_large_dense_part_takes_no_memory_to_count() -> None:
    ssr = "{name: ssr, filter: dynamic, num_views: 64, view_dim: 1024, num_layers: 3}"
    cost = dense_cost(make_case(dict.fromkeys("abcdefgh", 9), [f"--over_arch={ssr}"]))
    assert cost.parameters > 8e9


def test_bf16_halves_what_is_kept_of_products() -> None:
    ssr = "--over_arch={name: ssr, filter: dynamic, num_views: 2, view_dim: 32}"
    full, half = (dense_cost(make_case({"a": 9}, [ssr, f"--train.bf16={on}"])) for on in ("false", "true"))
    assert 0.4 * full.activation_bytes < half.activation_bytes < full.activation_bytes
    assert gemm_precision(make_case({"a": 9}, ["--train.bf16=true"])) == "bf16"
    assert gemm_precision(make_case({"a": 9}, ["--train.tf32=true"])) == "tf32"
    assert gemm_precision(make_case({"a": 9}, [])) == "fp32"


@pytest.mark.parametrize(
    ("optimizer", "floats"), [("sgd", 0), ("rowwise_adagrad", 100), ("adagrad", 1600), ("lazy_adam", 3200)]
)
def test_state_of_a_shard(optimizer: str, floats: int) -> None:
    assert state_bytes(optimizer, 100, 16) == 4 * floats


def test_bytes_of_a_shard_by_kernel() -> None:
    args = {
        "element_bytes": 2,
        "optimizer": "rowwise_adagrad",
        "load_factor": 0.25,
        "id_bytes": 240.0,
        "pooled_rows": 5.0,
    }
    fused = shard_bytes([1000, 16], kernel="fused", **args)  # type: ignore[arg-type]
    assert (fused.weights, fused.state, fused.host, fused.gradients) == (32_000, 4000, 0, 0)
    assert fused.buffers == 240 + 2 * 5 * 16 * 4
    cached = shard_bytes([1000, 16], kernel="fused_uvm_caching", **args)  # type: ignore[arg-type]
    assert (cached.weights, cached.state, cached.host) == (8000 + 1000 * (4 + 4), 0, 36_000)
    uvm = shard_bytes([1000, 16], kernel="fused_uvm", **args)  # type: ignore[arg-type]
    assert (uvm.weights, uvm.state, uvm.host) == (0, 0, 36_000)
    dense = shard_bytes([1000, 16], kernel="dense", **{**args, "optimizer": "adam", "element_bytes": 4})  # type: ignore[arg-type]
    assert (dense.weights, dense.state, dense.gradients) == (64_000, 128_000, 64_000)


def test_links_of_two_hosts_of_eight() -> None:
    """By hand: a card of 200 Gb/s a GPU, 300 GB/s of NVLink, both used to 80 %."""
    links = Links(load_hardware("a100_80g"), 8)
    card, host, link = 20e6, 160e6, 240e6  # bytes a millisecond
    all_to_all = CollectiveType.ALL_TO_ALL
    assert links.get_bw(8, 16, all_to_all) == pytest.approx(card / 0.5)
    assert links.get_bw(8, 8, all_to_all) == pytest.approx(link / (7 / 8))
    assert links.get_bw(1, 2, all_to_all) == pytest.approx(card / 0.5)
    assert links.get_bw(8, 128, all_to_all) == pytest.approx(card / (120 / 128))
    assert links.get_bw(8, 16, CollectiveType.REDUCE_SCATTER) == pytest.approx(host * 16 / 15)
    assert links.get_bw(8, 8, CollectiveType.ALL_GATHER) == pytest.approx(link * 8 / 7)
    assert links.get_bw(8, 16, CollectiveType.ALL_REDUCE) == pytest.approx(host * 16 / 15 / 2)
    assert links.get_bw(1, 1, all_to_all) > 1e12


def test_counting_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    dense_cost(make_case({"a": 9}, []))
    assert torch.equal(torch.rand(3), expected)
