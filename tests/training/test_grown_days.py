"""Runs on a dataset to which days have been added since: resumed, refused, warm-started."""

import shutil

import pytest

from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.serving.trained_model import restore_model
from tests.data.test_add import NEW, OLD, log
from tests.days_log import options
from tests.jobs import refused_job, stopped_job, train_job
from tests.prepare_log import spec_with
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    rule = {"type": "days", "column": "day", "fit_days": 3}
    spec = spec_with(split=rule, hash_buckets={"uid": 50})
    prepare([log(folder, OLD[:6], "a.parquet")], folder / "data", spec)
    return folder / "data"


def figures(report):
    return [(row["day"], row["step"], row["tasks"]) for row in report["days"]]


@pytest.mark.slow
def test_a_run_goes_on_into_days_that_came_after_it_had_begun(old, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(old, data)
    assert run_ranks(stopped_job, 1, options(data, tmp_path), 11) == ["preempted"]
    add([log(tmp_path, NEW[:2], "b.parquet")], data)
    report = run_ranks(train_job, 1, options(data, tmp_path))[0]
    whole = run_ranks(train_job, 1, options(data, tmp_path / "whole"))[0]
    assert figures(report) == figures(whole)
    assert [row["day"] for row in report["days"]] == [*OLD[3:6], *NEW[:2]]
    # A finished run on the smaller dataset is still that dataset's.
    assert restore_model(tmp_path / "run", data).schema.dataset_id == Schema.read(data).dataset_id


@pytest.mark.slow
def test_a_run_from_before_its_vocabularies_grew_is_begun_anew_with_its_weights(old, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(old, data)
    today = options(data, tmp_path / "today")
    assert run_ranks(stopped_job, 1, options(data, tmp_path / "stopped"), 11) == ["preempted"]
    run_ranks(train_job, 1, today)
    weights = restore_model(tmp_path / "today" / "run", data).model.state_dict()
    add([log(tmp_path, NEW[:2], "b.parquet")], data, extend=True)
    schema = Schema.read(data)
    message = run_ranks(refused_job, 1, options(data, tmp_path / "stopped"))[0]
    assert "have been extended, so its tables are larger than the checkpoint's; begin a new run with" in message
    with pytest.raises(ValueError, match="before its vocabularies were extended: warm-start a run on it"):
        restore_model(tmp_path / "today" / "run", data)
    later = options(data, tmp_path / "later", f"--data.days={NEW[0]}..", "--embeddings.learning_rate=0")
    later += [f"--warm_start={tmp_path / 'today' / 'run'}", "--train.max_steps=1"]
    report = run_ranks(train_job, 1, later)[0]
    sizes = {feature.name: feature.num_embeddings for feature in Schema.read(old).features}
    assert report["warm_start"]["grown"] == {
        f"model.tables.embedding_bags.{feature.name}.weight": sizes[feature.name]
        for feature in schema.features
        if feature.num_embeddings > sizes[feature.name]
    }
    assert set(schema.new_from(NEW[0])) == {"user", "city", "tags"} & {
        feature.name for feature in schema.features if feature.num_embeddings > sizes[feature.name]
    }
    after = restore_model(tmp_path / "later" / "run", data).model.state_dict()
    for name, weight in weights.items():
        if ".embedding_bags." in name:
            assert after[name][: len(weight)].equal(weight)
    # The first new day was evaluated as if its new values had no ids.
    shutil.copytree(old, tmp_path / "plain")
    add([log(tmp_path, NEW[:2], "b.parquet")], tmp_path / "plain")
    plain = [option.replace(str(data), str(tmp_path / "plain")).replace("/later", "/plain_runs") for option in later]
    other = run_ranks(train_job, 1, plain)[0]
    assert figures(report)[0] == figures(other)[0] and figures(other)[0][:2] == (NEW[0], 0)
    read = [
        next(Reader(data, schema, NEW[0], 16).reading(hide_new=hide).batches(0, 0)).sparse.values()
        for hide in (True, False)
    ]
    assert not read[0].equal(read[1])
