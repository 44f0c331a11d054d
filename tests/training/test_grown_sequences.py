"""A dataset with a sequence and a shared vocabulary grows by days: a run on it begins with the old rows' weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.schema import Schema
from ssr_rec.serving.trained_model import restore_model
from tests.data.test_add_sequences import NEW, OLD, log_of_days, made, write
from tests.days_log import options
from tests.jobs import train_job
from tests.ranks import run_ranks

TABLE = "event_tables.embedding_bags.goods.weight"
MODEL = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--sharding.types=[row_wise]"]
ENCODER = "--sequences={watched: {encoder: {name: transformer, dim: 16, num_heads: 2}}}"


@pytest.mark.slow
def test_a_grown_shared_table_keeps_its_rows(tmp_path: Path) -> None:
    """The checkpoint of one rank, with its table whole, goes to two ranks, which have half of its rows each."""
    data, log = made(tmp_path, OLD, "data"), log_of_days()

    def arguments(name: str, *more: str) -> list[str]:
        plain = [option for option in options(data, tmp_path / name) if "view" not in option]
        return [*plain, *MODEL, ENCODER, *more]

    run_ranks(train_job, 1, [option for option in arguments("old") if "row_wise" not in option])
    weights = restore_model(tmp_path / "old" / "run", data).model.state_dict()
    size = {feature.name: feature.num_embeddings for feature in Schema.read(data).features}["item"]
    add(write(log[log.day.isin(NEW)], tmp_path / "new.parquet"), data, extend=True)
    warm = [f"--warm_start={tmp_path / 'old' / 'run'}", "--embeddings.learning_rate=0", "--train.max_steps=1"]
    report = run_ranks(train_job, 2, arguments("new", f"--data.days={NEW[0]}..", *warm))[0]
    assert report["warm_start"]["grown"] == {f"model.{TABLE}": size}
    after = restore_model(tmp_path / "new" / "run", data).model.state_dict()
    assert len(after[TABLE]) > size == len(weights[TABLE]) and after[TABLE][:size].equal(weights[TABLE])
