"""A warm start after a list got weights, or lost them: its table is in another collection, and is taken anyway."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssr_rec.checkpointing.warm_rows import names_there
from ssr_rec.data.schema import Schema
from tests.checkpointing.test_resume import options
from tests.checkpointing.test_warm_values import values, warm_job
from tests.jobs import train_job
from tests.ranks import run_ranks
from tests.weighted_log import SPEC, frame, write_weighted

LISTS = {**SPEC["lists"], "tags": {"max_length": 3, "keep": "last"}}
SMALL = ["--embeddings.dim=8", "--over_arch={name: mlp, hidden: [4]}", "--train.max_steps=3", "--train.eval_every=3"]


def test_a_table_has_the_name_of_the_collection_that_it_was_in() -> None:
    model, state = (
        "model/model.{}.embedding_bags.a@first_order.weight",
        "optimizer/{}.model.{}.embedding_bags.a.weight/m",
    )
    for old, new in (("tables", "weighted_tables"), ("weighted_tables", "tables")):
        for pattern in (model.format, lambda one: state.format("fused", one), lambda one: state.format("tables", one)):
            assert names_there([pattern(new)], [pattern(old)]) == {pattern(new): pattern(old)}
    others = [model.format("event_tables"), model.format("tables").replace("a@", "b@")]
    assert names_there(others, [model.format("tables")]) == {name: name for name in others}


@pytest.mark.slow
@pytest.mark.parametrize("gets_weights", [True, False])
def test_a_table_is_taken_by_value_into_the_other_collection(tmp_path: Path, gets_weights: bool) -> None:
    weighted, plain = tmp_path / "weighted", tmp_path / "plain"
    write_weighted(weighted, frame(seed=1))
    write_weighted(plain, lists=LISTS, ignore=["tags_w"])
    there, here = (folder / "data" for folder in ((plain, weighted) if gets_weights else (weighted, plain)))
    run_ranks(train_job, 1, options(there, tmp_path, *SMALL))
    source = str(tmp_path / "run")
    report, new = run_ranks(warm_job, 1, options(here, tmp_path, *SMALL), str(here), source)[0]
    _, old = run_ranks(warm_job, 1, options(there, tmp_path, *SMALL), str(there), source)[0]
    assert not report["fresh"] and not report["unused"] and not report["optimizer"]["fresh"]
    assert Schema.read(here).weighted_tables != Schema.read(there).weighted_tables
    before, now = values(there, "tags"), values(here, "tags")
    assert len(before.keys() & now.keys()) > 8
    for value in before.keys() & now.keys():
        assert np.array_equal(new["tagged"][now[value]], old["tagged"][before[value]]), value
        assert np.array_equal(new["tagged/state"][now[value]], old["tagged/state"][before[value]]), value
    assert old["tagged/state"].any()


@pytest.mark.slow
def test_the_other_collection_keeps_another_optimizers_state_apart(tmp_path: Path) -> None:
    """Adam's first moments have the name and the size of element-wise Adagrad's sums."""
    weighted, plain = tmp_path / "weighted", tmp_path / "plain"
    write_weighted(weighted, frame(seed=1))
    write_weighted(plain, lists=LISTS, ignore=["tags_w"])
    run_ranks(train_job, 1, options(plain / "data", tmp_path, *SMALL, "--embeddings.optimizer=lazy_adam"))
    more = options(weighted / "data", tmp_path, *SMALL, "--embeddings.optimizer=adagrad")
    report, new = run_ranks(warm_job, 1, more, str(weighted / "data"), str(tmp_path / "run"))[0]
    assert report["optimizer"]["fresh"] and not new["tagged/state"].any() and new["tagged"].any()
