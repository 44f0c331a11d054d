"""Vectors given for a column's values: stored with the dataset, looked up by the model, never changed; and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_rec.checkpointing import warm_rows
from ssr_rec.checkpointing.warm_rows import Here, Origin, row_maps
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.preparation.append_days import add
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.importance import Scored
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.planning.cases import Case, make_world
from ssr_rec.planning.costs import dense_cost
from ssr_rec.planning.hardware import load_hardware
from ssr_rec.runs.folder import read_metrics
from ssr_rec.serving.export import Compared, export_run
from ssr_rec.serving.run_scorer import RunScorer
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import restore_model
from tests.jobs import train_job
from tests.made_run import make_run
from tests.ranks import run_ranks
from tests.vector_log import ITEMS, SMALL, SPEC, E, rows, vectors, wanted, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    write(folder)
    return folder / "data"


def test_every_row_sees_the_vector_of_its_value(data, tmp_path):
    run = make_run(tmp_path / "run", data, SMALL)
    model, schema = restore_model(run).model, Schema.read(data)
    assert schema.feature_names == ["user", "item", "shop", "text", "map"]
    assert set(model.tables.embedding_bags) == {
        f"{n}{s}" for n in ("user", "item", "shop") for s in ("", "@first_order")
    }
    assert model.dense.field_names == schema.feature_names
    scorer, log = RunScorer(run), rows()
    seen: list[torch.Tensor] = []
    model = scorer.restored.model
    handle = model.dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = scorer.predict(log)["click"]
    handle.remove()
    fields = seen[0][:, -16:].split(8, 1)
    for field, linear, vector in zip(fields, model.dense.vectors.linears, wanted(log), strict=True):
        plain = vector @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        np.testing.assert_allclose(field.detach().numpy(), plain, rtol=1e-5, atol=1e-5)
    assert np.std(found) > 0.01
    # A value that nobody has seen is as a missing one.
    pair = scorer.encoder.encode([{"user": 1, "item": "new", "shop": 2}, {"user": 1, "shop": 2}]).ids
    assert pair[3].tolist() == [1, 0] and (model.dense.vectors.frozen["text"][:2] == 0).all()
    # Prepared rows have the ids of raw ones.
    for split, part in (("train", log[:400]), ("test", log[500:])):
        batch = next(iter(Reader(data, schema, split, 4096, num_lanes=1).batches(0, 0)))
        ids = scorer.encoder.encode(part).ids
        prepared = np.stack([batch.sparse[name].values().numpy() for name in schema.feature_names])
        assert sorted(map(tuple, ids.T.tolist())) == sorted(map(tuple, prepared.T.tolist()))


def test_an_explanation_exchanges_vectors_in_all_inputs_of_the_over_arch(data, tmp_path):
    restored = restore_model(make_run(tmp_path / "run", data, SMALL))
    rows = SplitRows.read(data, restored.schema, "test")
    scored, order = Scored(restored.model, rows), np.random.default_rng(1).permutation(100)
    for columns in (["text"], ["map", "user"]):
        plain = rows.exchanged(columns, order).logits(restored.model)
        np.testing.assert_array_equal(scored.exchanged(columns, order), plain)
        assert np.abs(plain - scored.logits).max() > 1e-3


def test_what_made_the_dataset_says_nothing_of_where_the_file_lay(data, tmp_path):
    assert Schema.read(data).preparation["vectors"]["text"]["file"] == "text.parquet"
    assert write(tmp_path / "elsewhere").dataset_id == Schema.read(data).dataset_id
    other = {"item": ITEMS[::-1], "vector": (2 * vectors()[::-1]).tolist()}
    assert write(tmp_path / "other", other).dataset_id != Schema.read(data).dataset_id


def refusal(folder: Path, *args: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        write(folder, *args, **changes)
    return str(refused.value)


def test_bad_vectors_are_refused_in_one_line(tmp_path):
    good = vectors().tolist()
    for number, (vector, words) in enumerate(
        (
            ([0.0] * (E - 1), f"'i3' has a vector of {E - 1}, the first value one of {E} entries"),
            ([*good[3][:-1], float("nan")], "the vector of 'i3' holds nan; its entries must be finite"),
            ([*good[3][:-1], float("inf")], "the vector of 'i3' holds inf; its entries must be finite"),
            (None, "'i3' has no vector"),
        )
    ):
        table = {"item": ITEMS, "vector": [*good[:3], vector, *good[4:]]}
        assert words in refusal(tmp_path / f"bad{number}", table)
    assert "'i0' is there more than once" in refusal(tmp_path / "twice", {"item": ["i0", "i0"], "vector": good[:2]})
    lacking = refusal(tmp_path / "lacking", {"item": ITEMS[:29], "vector": good[:29]})
    assert "column 'item' is 'i29', for which vectors.text has no vector" in lacking and "log.parquet: row " in lacking
    assert "not lists of numbers" in refusal(tmp_path / "text", {"item": ITEMS, "vector": ["a"] * 30})
    assert "no column 'vector'; it must have 'item' and 'vector'" in refusal(
        tmp_path / "none", {"item": ITEMS, "vectors": good}
    )
    # Preparation would find the vector of 1 and scoring not, or no row would.
    for text, number in (("01", 1), ("1.0", 1), ("1.0", "1.0"), ("True", "x")):
        log = rows().assign(item=number)
        said = refusal(tmp_path / f"{text}{number!r}", {"item": [text, "2"], "vector": good[:2]}, log)
        assert f"{text!r} is written otherwise in the log" in said or "Failed to parse string" in said
    one = {"text": {"of": "item", "file": str(tmp_path / "no.parquet")}}
    assert "no.parquet: no such file" in refusal(tmp_path / "no", vectors=one)
    for bad, words in (
        ({"text": {"of": "click", "file": "x"}}, "'click' is not categorical"),
        ({"user": {"of": "item", "file": "x"}}, "vectors.user: there is a column of that name"),
    ):
        with pytest.raises(UserError, match=words):
            make_spec({**SPEC, "vectors": bad}, "test")


def test_days_that_are_added_see_the_same_vectors(tmp_path):
    log = rows().drop(columns="row").assign(day=np.arange(600) // 200)
    split = {"type": "days", "column": "day"}
    schema = write(tmp_path, log=log[:400], split=split)
    log[400:].to_parquet(tmp_path / "more.parquet")
    grown = add([str(tmp_path / "more.parquet")], tmp_path / "data", extend=True)
    assert grown.features[3] == schema.features[3]
    table = np.load(tmp_path / "data" / grown.features[3].vectors.file)
    batch = next(iter(Reader(tmp_path / "data", grown, "2", 4096, num_lanes=1).batches(0, 0)))
    found = table[batch.sparse["text"].values().numpy()]
    expected = wanted(log[400:])[0]
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
    log[400:].assign(day=3, item="who").to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"row 1: column 'item' is 'who', for which vectors\.text has no vector"):
        add([str(tmp_path / "bad.parquet")], tmp_path / "data")


def test_the_planner_counts_what_becomes_of_vectors(data):
    schema = Schema.read(data)
    world = make_world(1, 2, load_hardware("h100"))
    plain, given = (
        dense_cost(Case(load_config(None, SMALL), one, {}, world))
        for one in (schema.select(["user", "item", "shop", "map"], None), schema)
    )
    assert given.buffer_bytes - plain.buffer_bytes == 4 * E * 32
    assert given.parameters > plain.parameters and given.matmul_flops - plain.matmul_flops >= 2 * E * 8


def test_a_warm_start_on_other_vectors_is_refused(data, tmp_path, monkeypatch):
    origin = Origin(Schema.read(data).dataset_id, {"path": str(data)})
    monkeypatch.setattr(warm_rows, "origin_of", lambda folder: origin)
    write(tmp_path / "more", {"item": ["new", *ITEMS], "vector": [[0.0] * E, *vectors().tolist()]})
    found = row_maps(tmp_path, Here(tmp_path / "more" / "data", Schema.read(tmp_path / "more" / "data")))
    assert set(found) <= {"text"}
    other = vectors()
    other[7, 2] += 1
    write(tmp_path / "other", {"item": ITEMS, "vector": other.tolist()})
    here = Here(tmp_path / "other" / "data", Schema.read(tmp_path / "other" / "data"))
    with pytest.raises(UserError, match="vectors 'text' are others than those it was trained on, such as that of 'i7'"):
        row_maps(tmp_path, here)


@pytest.mark.slow
def test_trains_on_two_ranks_as_on_one_and_leaves_the_vectors_as_they_are(data, tmp_path):
    losses = {}
    options = [*SMALL, f"--data.path={data}", f"--runs={tmp_path}", "--train.batch_size=64", "--train.log_every=1"]
    options += ["--optimizer.learning_rate=0.01", "--train.epochs=3", "--data.num_lanes=4"]
    for ranks in (1, 2):
        report = run_ranks(train_job, ranks, [*options, f"--name=w{ranks}"])[0]
        metrics = read_metrics(tmp_path / f"w{ranks}" / "metrics.jsonl")
        losses[ranks] = np.array([row["loss"] for row in metrics if row["split"] == "train"])
    np.testing.assert_allclose(losses[2], losses[1], rtol=2e-5)
    # Of items that training has not seen, content is all that is known.
    assert report["test"]["click"]["auc"] > 0.7
    table = restore_model(tmp_path / "w2").model.dense.vectors.frozen["text"]
    np.testing.assert_array_equal(table[2:].numpy(), vectors()[::-1])


@pytest.mark.slow
def test_vectors_survive_an_export_and_score_equal_to_the_bit(data, tmp_path):
    run = make_run(tmp_path / "run", data, SMALL)
    export_run(run, tmp_path / "artifact", compared=Compared(split="test"))
    scorer, log = load(tmp_path / "artifact"), rows()
    stored = np.load(tmp_path / "artifact" / "tables" / "vectors-0.npy")
    np.testing.assert_array_equal(stored[2:], vectors()[::-1])
    batch = next(iter(Reader(data, Schema.read(data), "test", 4096, num_lanes=1).batches(0, 0)))
    ids = np.stack([batch.sparse[name].values().numpy() for name in scorer.schema.feature_names])
    # In the order of the prepared rows, as the last bit may depend on a row's place.
    place = {tuple(row): number for number, row in enumerate(scorer.encoder.encode(log[500:]).ids.T.tolist())}
    again = log[500:].iloc[[place[tuple(row)] for row in ids.T.tolist()]]
    assert torch.equal(scorer.score(batch), scorer.score_arrays(*scorer.encoder.encode(again)))
