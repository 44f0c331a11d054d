"""Lists whose items have weights: pooled as plain loops pool them, on any ranks, and served to the bit."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.embeddings.histories import reading_of
from ssr_rec.estimator.classifier import CTRClassifier
from ssr_rec.explaining.importance import Scored
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.runs.folder import read_metrics
from ssr_rec.serving.export import Compared, Form, export_run
from ssr_rec.serving.quantized_tables import pack, pooled
from ssr_rec.serving.raw_rows import Encoded, Encoder
from ssr_rec.serving.run_scorer import RunScorer
from ssr_rec.serving.score_file import _pieces
from ssr_rec.serving.scorer import load
from ssr_rec.serving.server_batcher import _joined
from ssr_rec.serving.server_requests import ARROW, JSON, read_request
from ssr_rec.serving.shared_lists import flat
from ssr_rec.serving.trained_model import restore_model
from ssr_rec.serving.user_once import encode_user_once
from tests.jobs import refused_jobs, stopped_job, train_job
from tests.made_run import make_run
from tests.ranks import run_ranks
from tests.weighted_log import SPEC, frame, pairs_of, write_weighted

SMALL = ["--over_arch.name=deepfm", "--over_arch.hidden=[16]", "--embeddings.dim=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    write_weighted(folder)
    return folder / "data"


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_a_list_is_pooled_as_a_loop_over_its_items(data, tmp_path, pooling):
    run = make_run(tmp_path / "run", data, [*SMALL, f"--embeddings.pooling={pooling}"])
    scorer, log = RunScorer(run), frame()
    model = scorer.restored.model
    assert set(model.weighted_tables.embedding_bags) == {
        f"{n}{s}" for n in ("tagged", "words") for s in ("", "@first_order")
    }
    assert "plain" in model.tables.embedding_bags
    seen: list[torch.Tensor] = []
    handle = model.dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scorer.predict(log)
    handle.remove()
    fields = dict(zip(model.dense.field_names, seen[0].split(8, 1), strict=True))
    encoded = scorer.encoder.encode(log)
    for place, (name, table) in enumerate((("tags", "tagged"), ("words", "words"))):
        weight = model.weighted_tables.embedding_bags[table].weight.detach()
        ids, offsets = encoded.lists[place]
        for row, pairs in enumerate(pairs_of(log, name)):
            own, total = ids[offsets[row] : offsets[row + 1]], sum(w for _, w in pairs)
            wanted = torch.zeros(8, dtype=torch.float64)
            for identity, (_, w) in zip(own, pairs, strict=True):
                wanted += w * weight[identity].double()
            if pooling == "mean" and total > 0:
                wanted /= total
            torch.testing.assert_close(fields[name][row].double(), wanted, rtol=1e-5, atol=1e-6)
        raw = torch.tensor([w for pairs in pairs_of(log, name) for _, w in pairs])
        summed = F.embedding_bag(
            torch.from_numpy(ids), weight, torch.from_numpy(offsets[:-1]), mode="sum", per_sample_weights=raw
        )
        if pooling == "sum":
            assert torch.equal(fields[name], summed)
    single = model.weighted_tables.embedding_bags["tagged"].weight[torch.from_numpy(encoded.ids[1])]
    assert torch.equal(fields["tag"], single)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_packed_tables_are_summed_with_weights(precision):
    generator = torch.Generator().manual_seed(1)
    table, ids = torch.randn(50, 8, generator=generator), torch.randint(0, 50, (40,), generator=generator)
    offsets, weights = torch.tensor([0, 3, 3, 20, 40]), torch.rand(40, generator=generator)
    packed = pack(table, precision)
    rows = pooled(packed, precision, ids, torch.arange(41))
    wanted = torch.stack(
        [
            sum((w * row for w, row in zip(weights[a:b], rows[a:b], strict=True)), torch.zeros(8))
            for a, b in pairwise(offsets)
        ]
    )
    torch.testing.assert_close(pooled(packed, precision, ids, offsets, weights=weights), wanted)


def test_what_cannot_be_read_is_refused(data):
    schema = Schema.read(data)
    config = load_config(None, ["--sequences.tags.encoder.name=pool"])
    with pytest.raises(UserError, match="table 'tagged' is of a list with weights, too"):
        reading_of(schema, config.sequences)
    with pytest.raises(UserError, match="needs one that is not"):
        reading_of(schema.select(["tags", "words"], None), {})


def test_an_explanation_moves_weights_with_their_items(data, tmp_path):
    restored = restore_model(make_run(tmp_path / "run", data, SMALL))
    rows = SplitRows.read(data, restored.schema, "test")
    order = np.random.default_rng(1).permutation(100)
    plain = rows.exchanged(["tags", "words"], order).logits(restored.model)
    np.testing.assert_allclose(Scored(restored.model, rows).exchanged(["tags", "words"], order), plain, atol=1e-6)
    moved = rows.exchanged(["tags"], order).block.lists[0]
    original = rows.block.lists[0]
    at = int(order[5])
    np.testing.assert_array_equal(
        moved.weights[moved.offsets[5] : moved.offsets[6]],
        original.weights[original.offsets[at] : original.offsets[at + 1]],
    )


def same(one: Encoded, other: Encoded) -> bool:
    pairs = [
        (one.ids, other.ids),
        *((a, b) for x, y in zip(one.lists, other.lists, strict=True) for a, b in zip(x, y, strict=True)),
    ]
    pairs += [(a, b) for a, b in zip(one.weights, other.weights, strict=True) if a is not None]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def typed_only(data: Path, folder: Path) -> Path:
    """A dataset whose weights all have columns of their own, which C++ reads whole."""
    lists = {"tags": {"max_length": 3, "keep": "last", "weights": "tags_w"}, "plain": {"max_length": 2}}
    write_weighted(folder, lists=lists, ignore=["words"])
    return folder / "data"


def test_every_form_of_raw_rows_has_the_same_weights(data, tmp_path):
    log = frame(60)
    records = log.astype(object).where(log.notna(), None).to_dict("records")
    for number, folder in enumerate((data, typed_only(data, tmp_path))):
        encoder = Encoder(Schema.read(folder), folder)
        wanted = encoder.encode(log)
        raw = [np.float32(w) for pairs in pairs_of(log, "tags") for _, w in pairs]
        np.testing.assert_array_equal(wanted.weights[0], raw)
        table = pa.Table.from_pandas(log)
        ways: list[Any] = [records, table, table.to_batches()[0], tuple(records)]
        ways.append([{**row, "tags_w": np.array(row["tags_w"] or [])} for row in records])
        ways.append([{k: v for k, v in row.items() if v is not None} for row in records])
        for way in ways:
            assert same(encoder.encode(way), wanted)
        if number:
            assert encoder._of_common_types(records) is not None and encoder._of_common_types(table) is not None
        # A user with many candidates.
        user = {key: records[9][key] for key in ("tags", "tags_w", "user")}
        candidates = [{key: row[key] for key in ("tag", "words", "plain")} for row in records]
        once = encode_user_once(encoder, user, candidates)
        assert same(flat(once), encoder.encode([{**user, **one} for one in candidates]))
        with pytest.raises(UserError, match="list 'tags': give it and its weights 'tags_w'"):
            encode_user_once(encoder, {"tags": [1]}, candidates)
        # What the server joins.
        halves = [encoder.encode(log[:25]), encoder.encode(log[25:])]
        assert same(_joined(halves), wanted)
    for row, words in (
        ({"tags": [1, 2], "tags_w": [1.0]}, "row 0: 'tags' has 2 items and 'tags_w' 1 weights"),
        ({"tags": [1]}, "row 0: 'tags' has 1 items and 'tags_w' 0 weights"),
        ({"tags": [1], "tags_w": [-1.0]}, "row 0: feature 'tags' has an item whose weight is -1.0"),
        ({"tags": [1], "tags_w": [None]}, "row 0: feature 'tags' has an item whose weight is missing"),
        ({"tags": [1], "tags_w": [float("inf")]}, "whose weight is inf"),
        ({"tags": [1], "tags_w": ["x"]}, "row 0: feature 'tags' holds the str 'x', not a number among the weights"),
        ({"tags": [1], "tags_w": 3}, "row 0: feature 'tags' holds the int 3, not a list of weights"),
    ):
        with pytest.raises(UserError) as refused:
            encoder.encode([row])
        assert words in str(refused.value)
    marked = Encoder(Schema.read(data), data)
    for items, words in (
        ("a:1|b", "row 1: feature 'words' has an item whose weight is missing or no number"),
        (["a:x"], "row 1: feature 'words' has an item whose weight is missing or no number"),
        ([7], "row 1: feature 'words' holds the int 7; its items are text such as a:0.5"),
        (["a:1", None], "row 1: feature 'words' holds a missing item"),
    ):
        with pytest.raises(UserError) as refused:
            marked.encode([{}, {"words": items}])
        assert words in str(refused.value)


def test_files_are_scored_as_they_are_prepared(data, tmp_path):
    log = frame(60)
    schema = Schema.read(data)
    encoder = Encoder(schema, data)
    log.to_parquet(tmp_path / "log.parquet")
    names = list(dict.fromkeys(encoder.columns))
    assert names[-1] == "tags_w"
    (piece,) = _pieces(tmp_path / "log.parquet", schema, names)
    assert same(encoder.encode(piece), encoder.encode(log))


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "tables"), [("mean", "fp32"), ("sum", "fp32"), ("mean", "int8"), ("sum", "int8")])
def test_an_artifact_scores_raw_rows_as_the_trained_model(data, tmp_path, pooling, tables):
    """Of tables in int8 the trained one whose rows are rounded so."""
    run = make_run(tmp_path / "run", data, [*SMALL, f"--embeddings.pooling={pooling}"])
    trained = RunScorer(run)
    export_run(run, tmp_path / "artifact", Form(tables), compared=Compared(split="test"))
    scorer, log = load(tmp_path / "artifact"), frame()
    batch = next(iter(Reader(data, Schema.read(data), "test", 4096, num_lanes=1).batches(0, 0)))
    model = trained.restored.model
    plain_eager = model(*batch.inputs).detach().clone()
    for name, bag in [*model.tables.embedding_bags.items(), *model.weighted_tables.embedding_bags.items()]:
        if tables == "int8" and "@" not in name:  # those of an over-arch's own are too narrow to be packed
            ids = torch.arange(len(bag.weight) + 1)
            bag.weight.data = pooled(pack(bag.weight, "int8"), "int8", ids[:-1], ids)
    eager = model(*batch.inputs)
    assert torch.equal(eager, plain_eager) == (tables == "fp32")
    # The tables' part is equal to the bit; a compiled over-arch may round otherwise.
    torch.testing.assert_close(scorer.score(batch), eager, rtol=4e-6, atol=4e-6)
    records = log.astype(object).where(log.notna(), None).to_dict("records")
    plain = scorer.predict(log)["click"]
    np.testing.assert_allclose(plain, trained.predict(log)["click"], rtol=0, atol=1e-6)
    body = {"rows": [{k: v for k, v in row.items() if k != "row"} for row in records]}
    by_json = read_request(JSON, json.dumps(body).encode(), 10_000).encode(scorer)
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pandas(log, preserve_index=False)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    by_arrow = read_request(ARROW, sink.getvalue().to_pybytes(), 10_000).encode(scorer)
    for encoded in (by_json, by_arrow):
        np.testing.assert_array_equal(scorer.predict_encoded(encoded)["click"], plain)
    user = {key: records[9][key] for key in ("tags", "tags_w", "user")}
    candidates = [{key: row[key] for key in ("tag", "words", "plain")} for row in records[:50]]
    once = scorer.predict_encoded(encode_user_once(scorer.encoder, user, candidates))["click"]
    np.testing.assert_array_equal(once, scorer.predict([{**user, **one} for one in candidates])["click"])


BUSY = [*SMALL, "--train.batch_size=64", "--train.log_every=1", "--optimizer.learning_rate=0.01", "--data.num_lanes=4"]
JOBS = {
    "tw": ["--sharding.types=[table_wise]"],
    "cw": ["--sharding.types=[column_wise]", "--sharding.per_table={tagged: {types: [column_wise], min_partition: 4}}"],
    "adam": ["--embeddings.optimizer=adam"],
    "sgd": ["--embeddings.optimizer=sgd"],
    "evicting": ["--embeddings.managed={words: {rows: 4, interval: 2}}"],
}


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", JOBS)
def test_two_ranks_train_as_one(data, tmp_path, kind):
    options = [*BUSY, *JOBS[kind], f"--data.path={data}", f"--runs={tmp_path}", "--train.epochs=3"]
    for ranks in (1, 2):
        report = run_ranks(train_job, ranks, [*options, f"--name=w{ranks}"])[0]
    assert len(losses(tmp_path / "w1")) == 21
    np.testing.assert_allclose(losses(tmp_path / "w2"), losses(tmp_path / "w1"), rtol=1e-5)
    assert report["test"]["click"]["auc"] > 0.5


def test_rows_of_a_weighted_table_cannot_be_spread_on_a_cpu(data, tmp_path):
    """TorchRec has no row-wise bags there; that of a GPU takes two of them to try."""
    options = [*BUSY, f"--data.path={data}", f"--runs={tmp_path}"]
    per_table = "--sharding.per_table={words: {types: [row_wise]}}"
    jobs = [[*options, one] for one in ("--sharding.types=[row_wise]", per_table)]
    of_all, of_one = run_ranks(refused_jobs, 1, jobs)[0]
    assert "sharding.types: 'row_wise' is not supported on cpu" in of_all
    assert "sharding.per_table.words.types: 'row_wise' is not supported on cpu" in of_one
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("evicting", 1), ("cw", 2), ("adam", 2), ("evicting", 2)])
def test_a_resumed_run_is_the_whole_one_to_the_bit(data, tmp_path, kind, ranks):
    options = [*BUSY, *JOBS[kind], f"--data.path={data}", f"--runs={tmp_path}", "--train.epochs=2"]
    whole = run_ranks(train_job, ranks, [*options, "--name=whole"])[0]
    assert run_ranks(stopped_job, ranks, [*options, "--name=parts"], 5) == ["preempted"] * ranks
    resumed = run_ranks(train_job, ranks, [*options, "--name=parts"])[0]
    assert resumed["test"] == whole["test"] and resumed["validation"] == whole["validation"]
    assert losses(tmp_path / "parts").tolist() == losses(tmp_path / "whole").tolist()


@pytest.mark.slow
def test_an_estimator_scores_as_the_run_that_it_is(tmp_path):
    log = frame().drop(columns="row")
    entries = {key: SPEC[key] for key in ("categorical", "lists", "vocabularies", "min_count")}
    model = CTRClassifier({"name": "mlp", "hidden": [8]}, embedding_dim=8, batch_size=64, verbose=False)
    model.fit(log, labels="click", **entries)
    found = model.predict_proba(log)[:, 1]
    model.save(tmp_path / "saved")
    model.to_run(tmp_path / "run")
    np.testing.assert_array_equal(CTRClassifier.load(tmp_path / "saved").predict_proba(log)[:, 1], found)
    np.testing.assert_allclose(RunScorer(tmp_path / "run").predict(log)["click"], found, rtol=0, atol=1e-7)
    heavier = log.assign(
        tags_w=[None if one is None else [9 * w + n for n, w in enumerate(one)] for one in log["tags_w"]]
    )
    assert not np.array_equal(model.predict_proba(heavier)[:, 1], found)
    with pytest.raises(UserError, match="row 0: 'tags' has 2 items and 'tags_w' 1 weights"):
        model.predict_proba(log.iloc[:1].assign(tags=[[1, 2]], tags_w=[[1.0]]))
