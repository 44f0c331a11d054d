"""tools/bench_inference.py: its requests, its turns, its figures and what it refuses. Not its speed."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.data.features import Hashing
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.kernels import extension
from ssr_rec.serving.latency import Requests
from ssr_rec.serving.raw_rows import Encoder
from tests.made_run import make_run
from tests.prepare_log import make_rows, run, spec_with, write_parquet

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = ["--embeddings.dim=8", "--over_arch.num_views=2", "--over_arch.view_dim=8"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_inference")


@pytest.fixture
def cases(bench):
    return importlib.import_module("inference_cases")


def test_drawn_rows_use_every_id_and_length(cases, dataset):
    schema = Schema.read(dataset)
    rows = cases.draw_rows(schema, 20_000, 3)
    assert len(rows) == 20_000
    for feature, ids, offsets in zip(schema.features, rows.ids, rows.offsets, strict=True):
        lengths = np.diff(offsets)
        assert set(np.unique(lengths)) == (set(range(feature.max_length + 1)) if feature.max_length else {1})
        assert ids.min() == 0 and ids.max() == feature.num_embeddings - 1
        assert len(ids) == offsets[-1]
    again = cases.draw_rows(schema, 20_000, 3)
    assert all(np.array_equal(a, b) for a, b in zip(rows.ids, again.ids, strict=True))
    assert not np.array_equal(rows.ids[0], cases.draw_rows(schema, 20_000, 4).ids[0])


def test_requests_are_rows_of_the_fold_as_the_reader_lays_them_out(cases, dataset):
    schema = Schema.read(dataset)
    rows = cases.read_rows(dataset, schema)
    batches = list(Reader(dataset, schema, "test", batch_size=16, num_lanes=1).epoch(0))
    start = 0
    for batch in batches:
        stop = start + len(batch.labels)
        values, lengths = rows.request(start, stop)
        assert torch.equal(values, batch.sparse.values()) and torch.equal(lengths, batch.sparse.lengths())
        assert np.array_equal(rows.labels[start:stop], batch.labels.numpy())
        start = stop
    assert start == len(rows) == schema.splits["test"].num_rows
    assert len(cases.read_rows(dataset, schema, 20)) == 20
    drawn = cases.requests_of(rows, 16, 0)
    assert len(drawn) >= 8
    assert all(len(lengths) == 16 * len(schema.features) for _, lengths in drawn)
    places = [start for start in range(len(rows) - 15) if torch.equal(rows.request(start, start + 16)[0], drawn[0][0])]
    assert places
    assert len({tuple(values.tolist()) for values, _ in drawn}) > len(drawn) // 2
    again = cases.requests_of(rows, 16, 0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, again, strict=True))
    with pytest.raises(ValueError, match="--batch 100000"):
        cases.requests_of(rows, 100_000, 0)


def test_the_eager_scorer_is_the_model_on_a_fresh_keyed_jagged_tensor(cases, dataset, tmp_path):
    run = make_run(tmp_path / "run", dataset, SMALL)
    schema = Schema.read(dataset)
    rows = cases.read_rows(dataset, schema)
    values, lengths = rows.request(3, 20)
    case = cases.Case("m", "eager", "eager", 1, schema, source=run, data=dataset)
    model = importlib.import_module("ssr_rec.serving.trained_model").restore_model(run).model
    with torch.no_grad():
        expected = model(KeyedJaggedTensor(schema.feature_names, values, lengths=lengths, stride=17))
    assert torch.equal(cases.load_case(case)(values, lengths), expected)


class Fake:
    """A worker whose requests take a known time."""

    def __init__(self, bench, name, seconds, log):
        case = importlib.import_module("inference_cases").Case
        sizes = {"parameters": 10, "flops_per_sample": 20, "tables": "fp32", "dense": "fp32", "artifact_bytes": None}
        self.case = case(name, "eager", "eager", 1, None, fixed=sizes)
        self.seconds, self.log, self.loaded = seconds, log, {"load_s": 1.5, "before_bytes": 40}

    def ask(self, what, *arguments):
        if what == "memory":
            return {"now": 90, "peak": 100}
        batch, clients, requests, warmup, _ = arguments
        self.log.append((self.case.model, batch, clients, requests, warmup))
        taken = self.seconds * batch
        if isinstance(requests, int):
            ends = taken * np.arange(1, requests + 1)
            return Requests(ends - taken, ends - taken, ends)
        return Requests(requests, requests + 0.5, requests + 0.5 + taken)


def options(bench, *more):
    return bench._parser().parse_args(["--config", "x.yaml", *more])


def test_turns_are_interleaved_and_figures_are_those_of_the_scorer(bench):
    log = []
    workers = [Fake(bench, "slow", 0.004, log), Fake(bench, "fast", 0.001, log)]
    chosen = options(bench, "--batch", "1", "10", "--repetitions", "6", "--load", ".5", ".9", "--open-seconds", "20")
    records = bench.measure(workers, chosen)
    closed = {(r["model"], r["batch"]): r for r in records["closed"]}
    assert closed["slow", 10]["median"] == pytest.approx(0.04)
    assert closed["fast", 10]["ratio"] == pytest.approx(0.25) and closed["slow", 1]["ratio"] == 1
    assert closed["fast", 10]["samples_per_s"] == pytest.approx(1_000)
    # Half a second of requests each, after two pilots of five.
    assert closed["fast", 1]["requests"] == 6 * 500 and closed["slow", 10]["requests"] == 6 * 12
    assert [entry[3] for entry in log[:8]] == [5] * 8
    turns = [(model, batch) for model, batch, _, requests, _ in log[8:] if isinstance(requests, int)]
    assert all(sorted(turns[i : i + 4]) == sorted(turns[:4]) for i in range(0, 24, 4))
    assert len({tuple(turns[i : i + 4]) for i in range(0, 24, 4)}) > 1
    opened = [(model, requests) for model, batch, _, requests, _ in log if not isinstance(requests, int) and batch == 1]
    assert len(opened) == 2 * 2 * 6
    record = next(r for r in records["open"] if (r["model"], r["batch"], r["load"]) == ("fast", 1, 0.9))
    assert record["asked_per_s"] == pytest.approx(900)
    assert record["median"] == pytest.approx(0.501) and record["service"]["p50"] == pytest.approx(0.001)
    rates = sorted({round(len(due) / due[-1], -1) for model, due in opened if model == "fast"})
    assert rates[0] == pytest.approx(500, rel=0.05) and rates[-1] == pytest.approx(900, rel=0.05)
    # The same pattern of arrivals for both, at the pace of each.
    fast, slow = ([due for model, due in opened if model == name and len(due) > 10] for name in ("fast", "slow"))
    assert any(np.allclose(a[:50], 4 * b[:50]) for a in slow for b in fast)
    assert records["cases"][0]["peak_bytes"] == 100 and records["cases"][0]["quality"] is None
    text = bench.tables(records)
    assert len(text) == 3 and "0.25x" in text[1] and "n/a" in text[1]


def test_losses_are_against_the_exact_form_of_the_same_model(bench):
    def case(model, tables, auc):
        return {"model": model, "tables": tables, "dense": "fp32", "quality": {"y": {"auc": auc, "logloss": 1 - auc}}}

    found = [case("a", "fp32", 0.7), case("a", "int8", 0.6), case("b", "int8", 0.5)]
    bench._losses(found)
    assert [c["quality"]["y"]["auc_loss"] for c in found] == [0, pytest.approx(0.1), None]
    assert found[1]["quality"]["y"]["logloss_rise"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--run", "r", "--match", "params=1e6"], "--match has no effect without --config"),
        (["--run", "r", "--over-archs", "mlp"], "--over-archs has no effect without --config"),
        (["--config", "c", "--multiple", "8"], "--multiple has no effect"),
        (["--artifact", "a", "--tables", "int8"], "--tables has no effect"),
        (["--config", "c", "--modes", "eager", "--dense", "bf16"], "--dense has no effect"),
        (["--config", "c", "--modes", "eager", "--raw"], "--raw has no effect"),
        (["--config", "c", "--clock", "cpu", "--threads", "2"], "--clock cpu"),
        (["--config", "c", "--batch", "0"], "--batch"),
        (["--config", "c", "--load", "0"], "--load"),
        (["--config", "c", "--seconds", "nan"], "--seconds"),
        (["--config", "c", "--match", "size=3"], "--match size=3"),
        (["--config", "c", "--match", "params=-3"], "--match params=-3"),
        (["--config", "c", "--picture", "/no/such/folder/x.png"], "--picture"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--run", "no-run"], "no-run"),
        (["--artifact", "no-artifact"], "no-artifact"),
    ],
)
def test_bad_options_end_with_one_line(bench, capsys, arguments, message):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def write_config(tmp_path, dataset):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"data: {{path: {dataset}}}\nembeddings: {{dim: 8}}\nover_arch: {{name: ssr, num_views: 2, view_dim: 8}}\n"
    )
    return path


def test_sources_of_a_config_are_matched_in_size(bench, dataset, tmp_path, capsys):
    chosen = options(bench, "--over-archs", "mlp:hidden=[8,8]", "ssr:num_views=2,view_dim=16", "mlp:hidden=[9]")
    chosen.config, chosen.multiple = [write_config(tmp_path, dataset)], 2
    sources = importlib.import_module("inference_sources").read_sources(chosen, bench.match_of("params=4e3"))
    assert [s.config.over_arch.name for s in sources] == ["mlp", "ssr", "mlp"]
    for source in sources:
        assert source.sizes["parameters"] == pytest.approx(4_000, rel=0.05)
    assert all(width % 2 == 0 for width in sources[0].config.over_arch.hidden)
    assert len({s.model for s in sources}) == 3
    assert "parameters, " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not extension.load(), reason="needs a C++ compiler")
def test_a_run_in_every_mode_from_processes_of_their_own(bench, dataset, tmp_path, capsys):
    run = make_run(tmp_path / "run", dataset, SMALL)
    png, loads = tmp_path / "p.png", ["--batch", "1", "16", "--clients", "1", "2", "--load", ".5", "--repetitions", "2"]
    short = ["--seconds", ".02", "--open-seconds", ".05", "--picture", str(png), "--keep", str(tmp_path / "kept")]
    assert bench.main(["--run", str(run), "--tables", "fp32", "int8", *loads, *short]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    labels = ["eager", "compiled", "aot fp32 tables, fp32 dense", "aot int8 tables, fp32 dense"]
    assert [case["label"] for case in found["cases"]] == labels
    assert len(found["closed"]) == len(found["open"]) == 4 * 2 * 2
    for case in found["cases"]:
        assert case["peak_bytes"] > case["before_bytes"] > 1e8 and case["load_s"] > 0
        assert set(case["quality"]) == set(Schema.read(dataset).labels)
    exact, int8 = found["cases"][0]["quality"], found["cases"][3]["quality"]
    for task, measures in exact.items():
        assert measures["auc_loss"] == 0 and found["cases"][2]["quality"][task]["auc_loss"] == pytest.approx(
            0, abs=1e-4
        )
        assert int8[task]["logloss"] != measures["logloss"]
    assert found["cases"][3]["artifact_bytes"] > 0 and png.stat().st_size > 10_000
    artifact = tmp_path / "kept" / "0-int8-fp32"
    few = ["--repetitions", "1", "--seconds", ".02", "--batch", "4", "--clock", "cpu"]
    assert bench.main(["--artifact", str(artifact), "--raw", "--data", str(dataset), *few]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["label"].rpartition(", ")[2] for case in found["cases"]] == ["fp32 dense", "mappings", "Arrow"]
    for task, measures in found["cases"][0]["quality"].items():
        assert measures["auc"] == int8[task]["auc"] and measures["auc_loss"] is None
    assert found["closed"][0]["batch"] == 4


def test_raw_rows_encode_to_the_ids_they_stand_for(bench, cases, tmp_path):
    schema, _ = run(tmp_path, [write_parquet(make_rows(), tmp_path / "log.parquet")], spec_with())
    rows = cases.draw_rows(schema, 400, 0)
    raw = importlib.import_module("inference_raw").raw_rows(schema, tmp_path / "out", rows, 50, 350)
    ids, lists, *_ = Encoder(schema, tmp_path / "out").encode(raw)
    singles = iter(ids)
    for feature, wanted, offsets in zip(schema.features, rows.ids, rows.offsets, strict=True):
        if feature.kind == "list":
            assert np.array_equal(lists[0][0], wanted[offsets[50] : offsets[350]])
            assert np.array_equal(lists[0][1], offsets[50:351] - offsets[50])
        elif isinstance(feature.encoding, Hashing):
            assert np.array_equal(next(singles) == 0, wanted[50:350] == 0)
        else:
            assert np.array_equal(next(singles), wanted[50:350])
