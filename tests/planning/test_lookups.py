"""Times of lookups on a CPU, by hand: bags, ids and bytes, of the whole host's figures a rank's share."""

from dataclasses import replace

import pytest

from ssr_rec.planning.hardware import LookupCosts, load_hardware
from ssr_rec.planning.remedies import plan_case
from tests.planning.small import make_case

COSTS = LookupCosts(bag=100, id=40, byte=0.5)


@pytest.mark.parametrize(
    ("optimizer", "times"), [("rowwise_adagrad", 1.0), ("adagrad", 1.7), ("sgd", 0.6), ("lazy_adam", 1.4)]
)
def test_a_lookup_by_hand(optimizer: str, times: float) -> None:
    """2,048 rows of 5 ids of a table of dim 16 on each of two ranks; a rank has half of the host."""
    hardware = load_hardware("cpu")
    assumed = hardware.assumptions.model_copy(update={"lookup_ns": COSTS})
    found = hardware.model_copy(update={"assumptions": assumed})
    more = ["--sharding.types=[table_wise]", f"--embeddings.optimizer={optimizer}"]
    estimate = plan_case(make_case({"seen": 1000}, more, hardware=found, lengths={"seen": 5.0})).estimate
    nanoseconds = 4096 * (100 + 5 * 40 + (5 + 1) * 16 * 4 * 0.5) * (1 + 2 * times) / 3
    with_table, without = sorted(estimate.time, key=lambda time: -time.lookup)
    assert with_table.lookup == pytest.approx(2 * nanoseconds / 1e6)
    assert without.lookup == 0


def test_ids_of_cpu_ranks_travel_in_the_open() -> None:
    """On a GPU they are on their way beside another batch; on a CPU the same cores do both."""
    estimate = plan_case(make_case({"seen": 1000}, [], hardware="cpu", lengths={"seen": 5.0})).estimate
    exchange, ids = (max(getattr(rank, part) for rank in estimate.time) for part in ("exchange", "ids"))
    latency = load_hardware("cpu").assumptions.collective_latency_us / 1000
    assert ids > 0
    assert estimate.step.all_to_all == pytest.approx(exchange + ids + 4 * latency)
    gpu = plan_case(make_case({"seen": 1000}, [], lengths={"seen": 5.0})).estimate
    assert gpu.step.all_to_all == pytest.approx(max(rank.exchange for rank in gpu.time) + 4 * 0.03)


@pytest.mark.parametrize("hardware", ["cpu", "a100_80g"])
def test_weights_of_a_list_are_sent_within_the_step_and_slow_its_lookup(hardware: str) -> None:
    """4,096 rows of 5 ids of 8 bytes and 4 of weight: one batch of them at the table, three of a rank's own."""
    found = load_hardware(hardware)
    if hardware == "cpu":
        assumed = found.assumptions.model_copy(update={"lookup_ns": COSTS})
        found = found.model_copy(update={"assumptions": assumed})
    types = ["--sharding.types=[table_wise]"]
    plain = make_case({"seen": 1000, "user": 8}, types, hardware=found, lengths={"seen": 5.0})
    features = [f.model_copy(update={"weights": ":"}) if f.kind == "list" else f for f in plain.schema.features]
    weighted = replace(plain, schema=plain.schema.model_copy(update={"features": features}))
    estimates = [plan_case(case).estimate for case in (plain, weighted)]
    ids, exchange, lookup = (
        [sum(getattr(rank, part) for rank in one.time) for one in estimates] for part in ("ids", "exchange", "lookup")
    )
    memory = [max(one.memory, key=lambda rank: rank.weights) for one in estimates]
    assert ids[0] > ids[1] > 0
    assert exchange[1] - exchange[0] == pytest.approx(1.5 * (ids[0] - ids[1]))
    own = 3 * 2048 * 5 * 4
    assert memory[1].buffers - memory[0].buffers == pytest.approx(4096 * 5 * (12 - 3 * 8) + own, abs=1)
    if hardware == "cpu":
        nanoseconds = 4096 * (100 + 5 * 40 + (5 + 1) * 16 * 4 * 0.5)
        assert lookup[1] - lookup[0] == pytest.approx(0.5 * 2 * nanoseconds / 1e6)
    else:
        assert lookup[1] > 1.05 * lookup[0]
