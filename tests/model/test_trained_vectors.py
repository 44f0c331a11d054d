"""Given vectors that are trained: what they begin with, what steps make of them, and where they go from there."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ssr_rec.checkpointing import warm_rows
from ssr_rec.checkpointing.warm_rows import Here, Origin
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.tables import build_tables
from ssr_rec.embeddings.trained_vectors import copy_rows, starting_rows
from ssr_rec.planning.cases import Case, make_world, table_lookups
from ssr_rec.planning.costs import dense_cost
from ssr_rec.planning.hardware import load_hardware
from ssr_rec.planning.search import find_plan
from ssr_rec.runs.folder import read_metrics
from ssr_rec.serving.export import Compared, Form, export_run
from ssr_rec.serving.run_scorer import RunScorer
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import build_plain_model, restore_model
from tests.jobs import stopped_job, train_job, trained_vectors_job, warm_vectors_job
from tests.made_run import make_run
from tests.ranks import run_ranks
from tests.vector_log import ITEMS, E, rows, vectors, wanted, write

LR, STEPS, EPS = 0.1, 5, 1e-8
MLP = ["--over_arch.name=mlp", "--over_arch.hidden=[16]", "--embeddings.dim=8"]
TRAINED = [*MLP, "--embeddings.trained_vectors=[text]"]
COLUMNS = 8
"""Of the table of vectors of 6 entries."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    write(folder)
    return folder / "data"


def padded() -> np.ndarray:
    """The table that training begins with: rows of missing and unknown values, then the file's."""
    table = np.zeros((len(ITEMS) + 2, COLUMNS), np.float32)
    table[2:, :E] = vectors()[::-1]
    return table


def test_any_cut_of_a_table_begins_with_its_vectors() -> None:
    whole, stored = padded(), padded()[:, :E]
    for row_ends, column_ends in (
        ([0, 32], [0, 8]),
        ([0, 11, 22, 32, 32], [0, 8]),
        ([0, 32], [0, 4, 8]),
        ([0, 32], [0, 6, 8]),
    ):
        table = np.full((32, COLUMNS), np.nan, np.float32)
        for top, bottom in pairwise(row_ends):
            for left, right in pairwise(column_ends):
                copy_rows(torch.from_numpy(table)[top:bottom, left:right], stored, top, left)
        np.testing.assert_array_equal(table, whole)


def plain_steps(options: list[str], data: Path, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tables after some steps, by indexing, autograd and the optimizer written out; all else stays."""
    config, schema = load_config(None, options), Schema.read(data)
    dense = build_plain_model(config, schema).dense
    tables = {
        name.split(".")[-2]: torch.tensor(t, requires_grad=True)
        for name, t in before.items()
        if "embedding_bags" in name
    }
    state = {name: torch.zeros(len(table)) for name, table in tables.items()}
    place = torch.tensor(np.load(data / schema.features[4].vectors.file))
    reader = Reader(data, schema, "train", config.train.batch_size, num_lanes=4, seed=config.seed)
    for batch, _ in zip(reader.epoch(0), range(STEPS), strict=False):
        ids = {name: batch.sparse[name].values() for name in schema.feature_names}
        given = [tables["text"][ids["text"]][:, :E], place[ids["map"]]]
        fields = [tables[name][ids[name]] for name in ("user", "item", "shop")]
        fields += [linear(one) for linear, one in zip(dense.vectors.linears, given, strict=True)]
        logits = dense.heads(dense.over_arch(torch.cat(fields, 1)))
        binary_cross_entropy_with_logits(logits, batch.labels).backward()
        for name, table in tables.items():
            gradient, table.grad = table.grad, None
            if config.embeddings.optimizer == "rowwise_adagrad":
                state[name] += gradient.square().mean(1)
                gradient = gradient / (state[name].sqrt() + EPS)[:, None]
            table.data -= LR * gradient
    return {name: table.detach().numpy() for name, table in tables.items()}


COLUMN_WISE = "--sharding.per_table={text: {types: [column_wise], min_partition: 4}}"


@pytest.mark.parametrize(
    "ranks, further",
    [(1, []), pytest.param(2, [], marks=pytest.mark.slow), (2, ["--embeddings.optimizer=sgd", COLUMN_WISE])],
    ids=["1", "2", "columns"],
)
def test_steps_from_the_given_vectors_are_those_of_a_plain_loop(data, ranks: int, further: list[str]) -> None:
    options = [*TRAINED, f"--embeddings.learning_rate={LR}", "--optimizer.learning_rate=0", *further]
    options += ["--train.batch_size=64", "--data.num_lanes=4"]
    (same, before, after), *_ = run_ranks(trained_vectors_job, ranks, options, str(data), STEPS)
    assert same  # at first logits are, to the bit, those of vectors that stay as given
    names = {name.split(".")[-2]: name for name in before if "embedding_bags" in name}
    np.testing.assert_array_equal(before[names["text"]], padded())
    expected = plain_steps(options, data, before)
    assert set(expected) == set(names) == {"user", "item", "shop", "text"}
    for name, table in expected.items():
        np.testing.assert_allclose(after[names[name]], table, rtol=1e-4, atol=2e-6, err_msg=name)
    moved = (after[names["text"]] != before[names["text"]]).any(1)
    assert moved[0] and moved[2:].sum() > 20 and not moved.all()
    assert (after[names["text"]][:, E:] == 0).all()


def test_a_warm_start_takes_trained_vectors_by_value_and_given_ones_of_new_values(data, tmp_path) -> None:
    run = make_run(tmp_path / "run", data, TRAINED)
    old = restore_model(run).model.tables.embedding_bags["text"].weight.detach()
    more = {"item": ["new", *ITEMS], "vector": [[0.5] * E, *vectors().tolist()]}
    write(tmp_path / "more", more)
    options = [*TRAINED, f"--data.path={tmp_path / 'more' / 'data'}"]
    report, table = run_ranks(warm_vectors_job, 1, options, str(tmp_path / "more" / "data"), str(run), str(data))[0]
    assert report["mapped"]["model.tables.embedding_bags.text.weight"] == "32 of 33"
    expected = torch.cat([old[:2], torch.tensor([[0.5] * E + [0.0] * 2]), old[2:].flip(0)])
    np.testing.assert_array_equal(table, expected)


def test_vectors_of_another_length_are_not_taken_even_where_tables_are_as_wide(data, tmp_path, monkeypatch) -> None:
    origin = Origin(Schema.read(data).dataset_id, {"path": str(data)})
    monkeypatch.setattr(warm_rows, "origin_of", lambda folder: origin)
    schema = write(tmp_path, {"item": ITEMS, "vector": [[1.0] * COLUMNS] * len(ITEMS)})
    found = warm_rows.row_maps(tmp_path, Here(tmp_path / "data", schema))
    assert set(found) == {"text"} and (found["text"].rows == -1).all()


def refusal(data: Path, *options: str) -> str:
    config = load_config(None, [*MLP, *options])
    with pytest.raises(UserError) as refused:
        build_tables(Schema.read(data), config.embeddings, "cpu")
        starting_rows(Schema.read(data), config.embeddings, data)
    return str(refused.value)


def test_what_cannot_be_trained_is_refused_in_one_line(data, tmp_path) -> None:
    one = "--embeddings.trained_vectors=[text]"
    assert "names 'item', which has no vectors given by id; those of 'content' are text, map" in refusal(
        data, "--embeddings.trained_vectors=[item]"
    )
    assert "dims names 'text', whose vectors of 6 are given; vectors that are" in refusal(
        data, one, "--embeddings.dims={text: 8}"
    )
    assert "managed names 'text', whose" in refusal(data, one, "--embeddings.managed={text: {rows: 9}}")
    assert "dtypes names 'text', whose vectors of 6 are given; they have a table where" in refusal(
        data, "--embeddings.dtypes={text: fp16}"
    )
    large = vectors()
    large[4, 1] = 7e4
    write(tmp_path, {"item": ITEMS, "vector": large.tolist()})
    said = refusal(tmp_path / "data", one, "--embeddings.dtype=fp16")
    assert "vectors 'text' have an entry of 70000, which fp16 cannot hold; set --embeddings.dtypes" in said
    table = Path(tmp_path / "data" / Schema.read(tmp_path / "data").features[3].vectors.file)
    table.write_bytes(table.read_bytes()[:-8])
    assert "text.npy: not the vectors of 'text'" in refusal(tmp_path / "data", one)
    np.save(table, large)
    assert "text.npy: shape (30, 6), the schema says (32, 6)" in refusal(tmp_path / "data", one)


def test_the_planner_counts_trained_vectors_as_a_table(data) -> None:
    schema, lookups = Schema.read(data), table_lookups(data, Schema.read(data))
    world = make_world(1, 2, load_hardware("h100"))
    frozen, trained = (Case(load_config(None, one), schema, {}, world, lookups) for one in (MLP, TRAINED))
    costs = [dense_cost(case) for case in (frozen, trained)]
    assert costs[0].buffer_bytes - costs[1].buffer_bytes == 4 * E * 32
    assert costs[0].parameters == costs[1].parameters and costs[0].matmul_flops == costs[1].matmul_flops
    found = {option.name: option for option in find_plan(trained, costs[1]).options}
    assert set(found) == {"user", "item", "shop", "text"} and tuple(found["text"].tensor.shape) == (32, COLUMNS)
    # Nothing says which of its rows are looked up; that of missing values is counted.
    shares = trained.block_shares("text", 2)
    missing = schema.trained_lookups["text"].share("missing")
    assert 0.05 < missing < 0.2 and shares == pytest.approx(
        [missing + (1 - missing) * 14 / 30, (1 - missing) * 16 / 30]
    )


def in_order_of(rows_: pd.DataFrame, scorer: Any, batch: Any) -> pd.DataFrame:
    """Raw rows in the order of a batch of prepared ones, as the last bit may depend on a row's place."""
    ids = np.stack([batch.sparse[name].values().numpy() for name in scorer.schema.feature_names])
    place = {tuple(row): number for number, row in enumerate(scorer.encoder.encode(rows_).ids.T.tolist())}
    return rows_.iloc[[place[tuple(row)] for row in ids.T.tolist()]]


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["fp32", "int8"])
def test_trained_vectors_survive_an_export(data, tmp_path, tables: Any) -> None:
    run, log = make_run(tmp_path / "run", data, TRAINED), rows()
    compared = Compared(split="test")
    report = export_run(run, tmp_path / "artifact", Form(tables), compared=compared)
    scorer, model = load(tmp_path / "artifact"), restore_model(run).model
    stored = np.load(tmp_path / "artifact" / "tables" / "vectors-0.npy")
    np.testing.assert_array_equal(stored, model.tables.embedding_bags["text"].weight.detach()[:, :E])
    assert not np.array_equal(stored, padded()[:, :E])
    batch = next(iter(Reader(data, Schema.read(data), "test", 4096, num_lanes=1).batches(0, 0)))
    again = in_order_of(log[500:], scorer, batch)
    assert torch.equal(scorer.score(batch), scorer.score_arrays(*scorer.encoder.encode(again)))
    assert report["parity"]["max_difference"] <= (1e-6 if tables == "fp32" else 0.01)
    if tables == "fp32":
        by_run = RunScorer(run).predict(again)["click"]
        np.testing.assert_allclose(scorer.predict(again)["click"], by_run, rtol=1e-6)


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_to_the_same_vectors(data, tmp_path) -> None:
    options = [*TRAINED, f"--data.path={data}", "--train.batch_size=64", "--train.log_every=1", "--name=run"]
    options += ["--embeddings.learning_rate=0.1", "--train.epochs=3", "--train.eval_every=4", "--data.num_lanes=4"]
    whole, parts = ([*options, f"--runs={tmp_path / name}"] for name in ("whole", "parts"))
    run_ranks(train_job, 2, whole)
    assert run_ranks(stopped_job, 2, parts, 6) == ["preempted"] * 2
    run_ranks(train_job, 2, parts)
    losses, tables = [], []
    for name in ("whole", "parts"):
        metrics = read_metrics(tmp_path / name / "run" / "metrics.jsonl")
        losses.append([row["loss"] for row in metrics if row["split"] == "train"])
        tables.append(restore_model(tmp_path / name / "run").model.tables.embedding_bags["text"].weight)
    assert losses[0] == losses[1] and len(losses[0]) > 15
    assert torch.equal(*tables) and not np.array_equal(tables[0].detach(), padded())
    found = RunScorer(tmp_path / "parts" / "run").predict(rows())["click"]
    assert np.isfinite(found).all() and np.std(found) > 0.05 and len(wanted(rows())[0]) == len(found)
