"""A share of the ids of training becomes out of vocabulary; which ones depends on no rank and no resume."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from ssr_rec.config.data import DataConfig
from ssr_rec.config.run import load_config
from ssr_rec.data.oov_dropout import OovDropout, oov_shares
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.runs.folder import read_metrics
from ssr_rec.training.datasets import open_reader
from tests.jobs import refused_job, stopped_job, train_job
from tests.model.test_given_vectors import write
from tests.prepare_log import make_rows, run, spec_with, write_csv
from tests.ranks import run_ranks

SHARES = {"city": 0.3, "tags": 0.5}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Schema]:
    folder = tmp_path_factory.mktemp("oov")
    schema, _ = run(folder, [write_csv(make_rows(6000), folder / "log.csv")], spec_with(min_count=1))
    return folder / "out", schema


def read(prepared, shares, rank=0, ranks=1, epoch=0, start=0, seed=3) -> list[dict[str, list]]:
    """The ids of each batch by feature."""
    folder, schema = prepared
    dropout = OovDropout(shares, schema, "train", 7) if shares else None
    reader = Reader(folder, schema, "train", 512, (rank, ranks), 4, seed).reading(oov_dropout=dropout)
    batches = []
    for batch in reader.batches(epoch, start):
        parts = batch.sparse.values().split(batch.sparse.length_per_key())
        batches.append({name: part.tolist() for name, part in zip(schema.feature_names, parts, strict=True)})
    return batches


def joined(batches: list[dict[str, list]], name: str) -> np.ndarray:
    return np.concatenate([batch[name] for batch in batches])


def test_the_share_of_known_ids_is_dropped_and_nothing_else_changes(prepared):
    plain, dropped = read(prepared, {}), read(prepared, SHARES)
    for name in prepared[1].feature_names:
        before, after = joined(plain, name), joined(dropped, name)
        changed = before != after
        if name not in SHARES:
            assert not changed.any()
            continue
        assert (after[changed] == 1).all() and (after[before == 0] == 0).all()
        known = (before > 1).sum()
        assert abs(changed.sum() / known - SHARES[name]) < 5 * np.sqrt(0.25 / known)
    other = joined(read(prepared, SHARES, epoch=1), "city")
    assert len(other) == len(joined(dropped, "city")) and (other == 1).sum() != (joined(dropped, "city") == 1).sum()


def test_ranks_and_resuming_drop_the_same_ids(prepared):
    whole = read(prepared, SHARES)
    for ranks in (2, 4):
        parts = [read(prepared, SHARES, rank, ranks) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            for name in batch:
                together = [i for part in parts for i in part[step][name]]
                assert sorted(together) == sorted(batch[name]), (ranks, step, name)
    assert read(prepared, SHARES, start=5) == whole[5:]


def test_only_training_is_touched(prepared):
    config = load_config(None, ["--data.oov_dropout=0.9", "--train.eval_batch_size=512", "--train.batch_size=512"])
    for split, is_train in (("train", True), ("train", False), ("validation", None), ("test", None)):
        reader = open_reader(config, *prepared, split, 0, 1, is_train)
        assert (reader.oov_dropout is not None) == (is_train is True)


def test_what_cannot_be_is_refused(prepared):
    _, schema = prepared
    assert oov_shares(0.1, schema) == {"user": 0.1, "city": 0.1, "tags": 0.1} and oov_shares(0.0, schema) == {}
    with pytest.raises(ValueError, match="names 'price', which has no out-of-vocabulary id; those that have one: user"):
        oov_shares({"price": 0.1}, schema)
    with pytest.raises(ValueError, match="names 'nope', which is not a feature that is used"):
        oov_shares({"nope": 0.1}, schema)
    assert oov_shares({"city": 0.2}, schema, "city") == {"city": 0.2} and oov_shares(0.0, schema, "city") == {}
    with pytest.raises(ValueError, match=r"domain 'city'; name the features, as in {user: 0.1, tags: 0.1}"):
        oov_shares(0.1, schema, "city")
    assert load_config(None, ["--domain=city"]).domain_of_parts is None
    for part in ("--heads.per_domain=true", "--over_arch.domain_views=1"):
        config = load_config(None, ["--data.oov_dropout=0.1", "--domain=city", part])
        assert config.domain_of_parts == "city"
        with pytest.raises(ValueError, match="parts of unknown values"):
            open_reader(config, *prepared, "train", 0, 1)
    for share in (-0.1, 1.0, {"city": 2.0}):
        with pytest.raises(ValidationError):
            DataConfig(oov_dropout=share)


def test_a_value_that_is_unknown_for_once_keeps_its_given_vector_unless_that_is_named(tmp_path):
    schema = write(tmp_path, min_count=5)
    assert list(oov_shares(0.5, schema)) == ["user", "item", "shop"]
    data = (tmp_path / "data", schema)
    plain, dropped = read(data, {}), read(data, oov_shares(0.5, schema))
    assert (joined(plain, "item") != joined(dropped, "item")).any()
    for name in ("text", "map"):
        assert (joined(plain, name) == joined(dropped, name)).all()
    named = read(data, oov_shares({"text": 0.5}, schema))
    changed = joined(named, "text") != joined(plain, "text")
    assert 0.3 < changed.mean() < 0.6 and set(joined(named, "text")[changed]) == {1}
    alone = schema.model_copy(update={"features": [f for f in schema.features if f.vectors is not None]})
    with pytest.raises(ValueError, match=r"oov_dropout=0\.1: no feature of dataset 'content' has a vocabulary"):
        oov_shares(0.1, alone)


def losses(runs: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(runs / "run" / "metrics.jsonl") if row["split"] == "train"]


@pytest.mark.slow
def test_runs_are_equal_on_any_ranks_and_resumed_and_evaluate_every_id(prepared, tmp_path):
    def options(runs: str, *more: str) -> list[str]:
        sizes = ("--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=4", "--train.batch_size=512")
        steps = (
            "--data.features=[user, city, tags]",
            "--train.log_every=1",
            "--train.epochs=2",
            "--train.eval_every=null",
            "--data.oov_dropout=0.4",
        )
        return [*sizes, *steps, f"--data.path={prepared[0]}", f"--runs={tmp_path / runs}", "--name=run", *more]

    for ranks in (1, 2, 4):
        run_ranks(train_job, ranks, options(str(ranks)))
    alone = losses(tmp_path / "1")
    assert len(alone) == 20
    np.testing.assert_allclose(losses(tmp_path / "2"), alone, rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "4"), alone, rtol=1e-5)
    assert run_ranks(stopped_job, 1, options("parts"), 7) == ["preempted"]
    other = options("parts", "--data.oov_dropout=0.3")
    assert "that run had data.oov_dropout=0.4, this one has 0.3" in run_ranks(refused_job, 1, other)[0]
    run_ranks(train_job, 1, options("parts"))
    assert losses(tmp_path / "parts") == alone

    frozen = ("--embeddings.learning_rate=0", "--optimizer.learning_rate=0", "--optimizer.weight_decay=0")
    with_it, without = (
        run_ranks(train_job, 1, options(f"frozen-{share}", *frozen, f"--data.oov_dropout={share}"))[0]["test"]
        for share in (0.4, 0.0)
    )
    assert with_it == without and losses(tmp_path / "frozen-0.4") != losses(tmp_path / "frozen-0.0")
