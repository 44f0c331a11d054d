"""From bytes and operations to a step, by hand."""

from dataclasses import replace

import pytest

from ssr_rec.planning.costs import DenseCost
from ssr_rec.planning.estimate import RankTime, host_time, step_time
from ssr_rec.planning.hardware import load_hardware
from ssr_rec.planning.remedies import plan_case
from ssr_rec.planning.report_text import days, rank_list
from tests.planning.small import make_case

DENSE = DenseCost(10_000_000, 0, 2_000_000_000, 1_000_000, 0, 100)
SMALL_DENSE = DenseCost(1000, 0, 2000, 100, 0, 10)
RANKS = [RankTime(3.0, 1.0, 0.5), RankTime(1.0, 2.0, 0.5)]


def test_a_step_by_hand() -> None:
    """16 GPUs of 256 rows; TF32 at 40 % of 156 TFLOP/s, 2,039 GB/s, 200 GB/s of network a host at 80 %."""
    case = make_case({"a": 9}, ["--train.tf32=true"], nodes=2, per_node=8)
    step = step_time(case, DENSE, RANKS * 8, 1.5)
    products = 3 * 2e9 * 256 / (156e12 * 0.4) * 1e3
    elementwise = 4 * 1e6 * 256 / 2039e6
    assert step.dense == pytest.approx(products + elementwise + 28 * 1e7 / 2039e6)
    all_reduce = 4e7 * 2 * 15 / 16 / 160e6 + 0.03
    assert step.all_reduce == pytest.approx(all_reduce)
    assert step.exposed_all_reduce == pytest.approx(max(0, all_reduce - 0.5 * 2 / 3 * (products + elementwise)))
    assert step.lookup == 3.0
    assert step.all_to_all == pytest.approx(2.0 + 4 * 0.03)
    assert step.waiting == pytest.approx(4.0 - 3.5)
    assert step.device == pytest.approx(3.0 + 2.12 + step.dense + step.exposed_all_reduce)
    assert step.total == pytest.approx(step.device + 0.28 * 1.5)


def test_one_rank_has_no_communication() -> None:
    step = step_time(make_case({"a": 9}, [], per_node=1), DENSE, RANKS[:1], 0.0)
    assert (step.all_to_all, step.all_reduce, step.exposed_all_reduce, step.waiting) == (0, 0, 0, 0)


def test_accumulation_reduces_and_updates_less_often() -> None:
    once, four = (
        step_time(make_case({"a": 9}, [f"--train.accumulate={n}"], nodes=2, per_node=8), DENSE, RANKS, 0.0)
        for n in (1, 4)
    )
    assert four.all_reduce == pytest.approx(once.all_reduce / 4)
    assert once.dense - four.dense == pytest.approx(0.75 * 28 * 1e7 / 2039e6)


def test_a_small_step_is_the_hosts() -> None:
    step = step_time(make_case({"a": 9}, []), SMALL_DENSE, [RankTime(0.1, 0.1, 0.1)] * 2, 4.0)
    assert step.total == pytest.approx(4.0 + 0.28 * step.device)
    assert step.bound.startswith("host")


def test_the_hosts_time_by_hand() -> None:
    """Three tables in two ways, 100 operators: 3.8 + 2 x 4.0 + 3 x 0.015 + 100 x 0.01 ms, on a host twice as fast."""
    hardware = load_hardware("a100_80g")
    faster = {"assumptions": hardware.assumptions.model_copy(update={"host_speed": 2.0})}
    types = ["--sharding.per_table={a: {types: [row_wise]}}", "--sharding.types=[table_wise]"]
    case = make_case({"a": 9, "b": 9, "c": 9}, types, hardware=hardware.model_copy(update=faster))
    assert host_time(case, plan_case(case).found.options, DENSE) == pytest.approx((3.8 + 8.0 + 0.045 + 1.0) / 2)


@pytest.mark.parametrize(("lookup", "exchange", "bound"), [(30.0, 1.0, "lookup"), (1.0, 30.0, "all-to-all")])
def test_the_bound_is_the_largest_part(lookup: float, exchange: float, bound: str) -> None:
    assert step_time(make_case({"a": 9}, []), SMALL_DENSE, [RankTime(lookup, exchange, 0.0)] * 2, 4.0).bound == bound


def test_speed_follows_from_the_step() -> None:
    estimate = plan_case(make_case({"a": 100_000, "b": 5}, [])).estimate
    assert estimate.samples_per_s == pytest.approx(4096 / estimate.step.total * 1000)
    assert estimate.samples_range == pytest.approx((estimate.samples_per_s / 1.4, estimate.samples_per_s * 1.4))
    assert estimate.days(1e9) == pytest.approx(1e9 / estimate.samples_per_s / 86_400)
    values = estimate.as_json()
    assert values["step_ms"]["total"] == estimate.step.total
    for rank in values["ranks"]:
        parts = rank["memory_bytes"]
        names = ("weights", "optimizer", "dense", "activations", "buffers", "reserved", "headroom")
        assert sum(parts[name] for name in names) == parts["capacity"]


def test_memory_of_a_rank_by_hand() -> None:
    """One table of 1000 x 16 on one of two GPUs, an MLP of 16 -> 32 -> 1, 2048 rows a rank, lists of 5 ids."""
    case = make_case({"seen": 1000}, ["--sharding.types=[table_wise]"], lengths={"seen": 5.0})
    with_table, without = sorted(plan_case(case).estimate.memory, key=lambda memory: -memory.weights)
    assert (with_table.weights, with_table.optimizer) == (64_000, 4_000)
    assert (without.weights, without.optimizer) == (0, 0)
    for memory in (with_table, without):
        assert memory.dense == 16 * (16 * 32 + 32 + 32 + 1)
        assert memory.activations == 2048 * 4 * (16 + 32)
        assert memory.capacity == int(79.1 * 2**30)
        assert memory.reserved == int((2 + 0.05 * 79.1) * 2**30)
    # Three batches of five ids and a label; the pooled row and its gradient.
    own = 2048 * (3 * (5 * 8 + 4) + 2 * 16 * 4)
    assert without.buffers == own
    assert with_table.buffers == own + 4096 * (3 * 5 * 8 + 2 * 16 * 4)
    half = plan_case(make_case({"seen": 1000}, ["--train.bf16=true"])).estimate.memory[0]
    assert half.dense == 18 * (16 * 32 + 32 + 32 + 1)


def test_the_hosts_work_hides_waiting() -> None:
    step = step_time(make_case({"a": 9}, []), SMALL_DENSE, [RankTime(6.0, 0.0, 0.0), RankTime(2.0, 0.0, 0.0)], 5.0)
    assert step.waiting == 2.0
    assert 4.0 < step.device - 2.0 < 5.0 < step.device
    # Even tables: the host is the longer; the device's rest and 28 % of what it lost are off.
    assert step.exposed_waiting == pytest.approx((step.device - 5.0) + 0.28 * (5.0 - (step.device - 2.0)))


def test_waiting_decides_whether_a_plan_is_unbalanced() -> None:
    estimate = plan_case(make_case({"a": 100_000, "b": 5}, [])).estimate
    for waiting, unbalanced in ((0.09, False), (0.11, True)):
        step = replace(estimate.step, host=0.0, waiting=waiting * estimate.step.device)
        assert replace(estimate, step=step).is_unbalanced is unbalanced
    uneven = replace(estimate, time=[RankTime(3, 0, 0), RankTime(1, 0, 0)])
    assert uneven.imbalance == 1.5


def test_ways_of_writing() -> None:
    assert [days(x) for x in (3.21, 0.5, 0.01, 1e-5)] == ["3.21 days", "12 hours", "14.4 minutes", "0.864 s"]
    assert rank_list([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
