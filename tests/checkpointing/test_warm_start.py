"""Weights alone: what fits is taken over, a table that has grown keeps its old rows, and all of it is reported."""

import json
from pathlib import Path

import numpy as np
import pytest

from ssr_rec.data.schema import Schema
from tests.cases import one_quick
from tests.checkpointing.test_resume import options
from tests.jobs import refused_job, train_job, warm_started_job
from tests.ranks import run_ranks

SMALL = ["--train.max_steps=6", "--train.eval_every=3"]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("trained")
    run_ranks(train_job, 2, options(dataset, runs, *SMALL))
    return runs / "run"


def grown(dataset: Path, folder: Path, rows: dict[str, int]) -> Path:
    """The same data under a schema whose vocabularies have grown."""
    schema = json.loads((dataset / "schema.json").read_text())
    del schema["checksum"]
    for feature in schema["features"]:
        feature["num_embeddings"] += rows.get(feature["name"], 0)
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / split).symlink_to(dataset / split)
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("optimizer", one_quick("rowwise_adagrad", "adam"))
def test_a_grown_table_keeps_its_old_rows(dataset, tmp_path, trained, world_size, optimizer):
    larger = grown(dataset, tmp_path / "larger", {"user": 7, "tags": 100})
    arguments = options(larger, tmp_path, f"--embeddings.optimizer={optimizer}")
    report, tables = run_ranks(warm_started_job, world_size, arguments, str(larger), str(trained))[0]
    _, old = run_ranks(warm_started_job, 1, options(dataset, tmp_path), str(dataset), str(trained))[0]
    _, fresh = run_ranks(warm_started_job, 1, options(larger, tmp_path), str(larger), None)[0]
    assert {name.split(".")[-2]: rows for name, rows in report["grown"].items()} == {"user": 50, "tags": 12}
    for name, rows in {f.name: f.num_embeddings for f in Schema.read(dataset).features}.items():
        assert np.array_equal(tables[name][:rows], old[name]), name
        assert np.array_equal(tables[name][rows:], fresh[name][rows:]), name
        assert not np.array_equal(old[name], fresh[name][:rows]), name
    assert len(tables["user"]) == 57 and not report["fresh"] and not report["other_size"] and not report["unused"]


@pytest.mark.slow
def test_what_does_not_fit_is_left_fresh_and_named(dataset, tmp_path, trained):
    more = ["--over_arch.num_views=3", "--data.features=[user, item, price]", f"--warm_start={trained}", *SMALL]
    report = run_ranks(train_job, 2, options(dataset, tmp_path, *more))[0]["warm_start"]
    assert sorted(name.split(".")[-2] for name in report["loaded"] if "embedding_bags" in name) == [
        "item",
        "price",
        "user",
    ]
    assert any("over_arch" in name for name in report["other_size"])
    assert sorted(name.split(".")[-2] for name in report["unused"] if "embedding_bags" in name) == ["history", "tags"]


def test_refusals(dataset, tmp_path, trained):
    nothing = run_ranks(refused_job, 2, options(dataset, tmp_path, f"--warm_start={tmp_path}"))[1]
    assert "neither a checkpoint nor a run folder with best weights" in nothing
    shrunk = grown(dataset, tmp_path / "shrunk", {"user": 5})
    best = next((trained / "checkpoints").glob("best-*"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in best.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes().replace(b"\x00", b"\x01", 1))
    assert "damaged" in run_ranks(refused_job, 2, options(shrunk, tmp_path, f"--warm_start={damaged}"))[1]
    assert not (tmp_path / "run").exists(), "a run that could not begin leaves nothing"
    alone = run_ranks(refused_job, 1, options(dataset, tmp_path, f"--resume={best}"))[0]
    assert "holds weights alone; start from them with --warm_start" in alone


def test_nothing_in_common_is_refused(dataset, tmp_path, trained):
    more = [o for o in options(dataset, tmp_path) if "view" not in o and "dim" not in o]
    more += ["--over_arch={name: mlp, hidden: [5]}", "--embeddings.dim=12", "--data.labels=[click]"]
    assert "nothing in" in run_ranks(refused_job, 1, [*more, f"--warm_start={trained}"])[0]
