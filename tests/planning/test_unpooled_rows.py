"""Row-wise plans of tables that sequences read un-pooled on CPU ranks: what is offered, its estimates, its remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssr_rec.config.run import load_config
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.plan_file import plan_of, write_plan
from ssr_rec.model.build import build_dense
from ssr_rec.model.history_fields import HistoryFields
from ssr_rec.planning.cases import Case, RowLookups, make_world
from ssr_rec.planning.costs import dense_cost
from ssr_rec.planning.hardware import load_hardware
from ssr_rec.planning.remedies import Planned, plan_case, try_remedies
from tests.jobs import train_job
from tests.planning.jobs import measured_job
from tests.planning.small import SMALL, with_memory
from tests.ranks import run_ranks
from tests.sequence_log import features, write_sequence_log
from tests.test_train import losses

ENCODER = "--sequences={clicked: {encoder: {name: din}}}"
ROWS = 4_000_000
LENGTHS = {"clicked_item": 3.0, "clicked_kind": 3.0, "clicked_age": 3.0, "viewed": 2.0, "tags": 1.5}


def make_case(*overrides: str, ranks: int = 4) -> Case:
    """The columns of tests/sequence_log.py with so many items."""
    columns = [f.model_copy(update={"num_embeddings": ROWS}) if f.table == "item" else f for f in features()]
    schema = Schema(name="sequences", dataset_id="", features=columns, labels=["click"], splits={})
    sequence = ENCODER.replace("clicked:", "clicked_item:")
    config = load_config(None, [*SMALL, "--embeddings.dim=16", sequence, *overrides])
    return Case(config, schema, LENGTHS, make_world(1, ranks, load_hardware("cpu")))


def ways(planned: Planned) -> dict[str, str]:
    return {option.name: option.sharding_type for option in planned.found.options}


def test_only_unpooled_tables_with_rows_for_all_are_cut_by_rows() -> None:
    planned = plan_case(make_case("--sharding.types=[row_wise]"))
    assert {name for name, way in ways(planned).items() if way == "row_wise"} == {"item"}
    assert "row_wise" not in ways(plan_case(make_case())).values(), "no default"


def test_a_rank_sends_the_vectors_of_its_own_rows_alone() -> None:
    """Forward and backward: the events of the whole batch, a share of a rank, at the all-to-all's bandwidth."""
    case = make_case("--sharding.types=[row_wise]")
    hot = replace(case, lookups={"item_id": RowLookups(1e9 / np.arange(1, ROWS + 1), 0, ROWS)})
    link = case.world.hardware.link_gb_s * 1e6 * case.world.hardware.assumptions.link_utilisation
    for one in (case, hot):
        [option] = [o for o in plan_case(one).found.options if o.name == "item"]
        shares = one.block_shares("item", 4)
        for shard, share in zip(option.shards, shares, strict=True):
            assert shard.perf is not None
            events = case.config.train.batch_size * (1 + 3.0 + 2.0) * share
            assert shard.perf.fwd_comms == pytest.approx(events * 16 * 4 * 3 / 4 / link, rel=0.01)
            assert shard.perf.bwd_comms >= shard.perf.fwd_comms
    assert shares[0] > 0.8


def test_row_wise_is_the_remedy_of_a_history_table_too_large_for_a_rank() -> None:
    case = with_memory(make_case(), 0.6)
    planned = plan_case(case)
    assert not planned.fits
    remedy = next(remedy for remedy in try_remedies(planned) if remedy.name == "row-wise")
    assert remedy.settings.startswith("--sharding.types=[table_wise, column_wise, row_wise]")
    assert remedy.planned is not None and remedy.planned.fits and ways(remedy.planned)["item"] == "row_wise"


def test_encoders_are_in_the_dense_part() -> None:
    """Products as the encoder counts them at the mean length; of DIN, an event more keeps at least its hidden units."""
    case = make_case()
    longer = replace(case, lengths={**LENGTHS, "clicked_item": 6.0})
    dense = build_dense(case.config, case.schema)
    [(_, encoder)] = HistoryFields(case.reading, case.config.embeddings).pairs()
    heads = 2 * 32
    assert dense_cost(case).matmul_flops == dense.over_arch.flops().matmul + heads + encoder.flops(3).matmul
    more = dense_cost(longer).activation_bytes - dense_cost(case).activation_bytes
    assert 3 * 36 * 4 <= more <= 3 * 36 * 4 * 8


@pytest.mark.slow
def test_a_saved_plan_is_followed_and_has_the_bytes_it_says(tmp_path: Path) -> None:
    log = write_sequence_log(tmp_path / "data", {"train": 503, "validation": 101, "test": 101})
    options = [*SMALL, "--embeddings.dim=8", "--train.batch_size=64", "--train.log_every=1", ENCODER]
    case = Case(
        load_config(None, [*options, "--sharding.types=[row_wise]"]),
        Schema.read(log),
        {},
        make_world(1, 2, load_hardware("cpu")),
    )
    planned = plan_case(case)
    assert {name for name, way in ways(planned).items() if way == "row_wise"} == {"item", "kind", "clicked_age"}
    plan = tmp_path / "plan.json"
    write_plan(plan_of(planned.found.options, "cpu", 2, 2), plan)
    saved = f"--sharding.plan={plan}"
    for real, memory in zip(
        run_ranks(measured_job, 2, [*options, saved], str(log)), planned.estimate.memory, strict=True
    ):
        assert (real["weights"], real["state"]) == (memory.weights, memory.optimizer)
        assert ("kind", (0, 0), (4, 8)) in real["shards"] or ("kind", (4, 0), (3, 8)) in real["shards"]
    for name, more in (("free", []), ("planned", [saved])):
        run_ranks(train_job, 2, [*options, f"--data.path={log}", f"--runs={tmp_path / name}", "--name=run", *more])
    assert np.abs(losses(tmp_path / "free") - losses(tmp_path / "planned")).max() < 1e-6
