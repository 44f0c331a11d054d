"""ONNX graphs: onnxruntime against the artifact's own scores, what is refused, and what a graph says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config, resolve
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.kernels import extension
from ssr_rec.metrics.links import Link
from ssr_rec.over_archs.registry import OVER_ARCHS
from ssr_rec.serving import onnx_export
from ssr_rec.serving.export import Form, export_run
from ssr_rec.serving.graph import ServingModel, make_layout, stacked_tables
from ssr_rec.serving.onnx_export import _refusal, make_onnx, onnx_inputs, write_onnx
from ssr_rec.serving.onnx_graph import _embedding_bag, _predicted, _searchsorted
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import Restored, build_plain_model
from tests.made_run import make_run, randomised
from tests.model.test_sequence_models import ENCODERS
from tests.over_archs.test_contract import CASES
from tests.prepare_log import make_rows, run, spec_with, write_parquet
from tests.sequence_log import write_sequence_log
from tests.serving.test_export import EXPORTED
from tests.weighted_log import write_weighted

SMALL = ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=8"]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as the eager graph: what the compiler makes of it is tested elsewhere, and takes a minute."""
    pytest.importorskip("onnxruntime")
    made: list[ServingModel] = []

    def remember(model: ServingModel, tables: list[Tensor], path: Path) -> None:
        path.write_bytes(b"")
        made.append(model)

    def program(path: Path, runners: int) -> Callable[[list[Tensor]], list[Tensor]]:
        model = made[-1]
        layout, histories = model.layout, model.histories.histories if model.histories is not None else ()
        counts = [2 * len(layout.lists) + len(layout.weighted), len(layout.lists) + len(histories)]
        counts.append(sum(map(len, layout.sets)))

        def run(inputs: list[Tensor]) -> list[Tensor]:
            ids, *rest = inputs
            ends = np.cumsum([0, *counts])
            parts = [rest[start:stop] for start, stop in pairwise(ends)]
            with torch.no_grad():
                return [model(ids, *parts, *rest[ends[-1] :])]

        return run

    monkeypatch.setattr("ssr_rec.serving.export.compile_model", remember)
    monkeypatch.setattr("ssr_rec.serving.scorer.load_program", program)


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    run(folder, [write_parquet(make_rows(), folder / "a.parquet")], spec_with())
    return folder / "out"


def odd_rows(count: int) -> list[dict[str, Any]]:
    """Rows of the log, most of them with a missing, unknown or empty value, the first without any value."""
    rows: list[dict[str, Any]] = [dict(row) for row in make_rows(count, seed=5)]
    for number, row in enumerate(rows):
        row.update([{"city": "nowhere"}, {"tags": []}, {"user": None}, {"price": None}, {"tags": [999, 3]}][number % 5])
    return [{}, *rows[1:]]


CONVERTED_OVER_ARCHS = [*(case for case in EXPORTED if "autofis" not in case), "ssr-s", "autofis"]
assert {CASES[case]["name"] for case in CONVERTED_OVER_ARCHS} == set(OVER_ARCHS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONVERTED_OVER_ARCHS)
def test_onnxruntime_gives_the_scorers_predictions(uncompiled: None, log: Path, tmp_path: Path, case: str) -> None:
    import onnx
    import onnxruntime

    options = [f"--over_arch.{key}={json.dumps(value)}" for key, value in CASES[case].items()]
    features = "--data.features=[tags, user, city, price]"
    made = make_run(tmp_path / "run", log, [*options, "--embeddings.dim=8", features], 0.1 if case == "afn+" else 0.3)
    report = export_run(made, tmp_path / "artifact", Form(onnx=True))
    assert report["onnx"]["max_difference"] <= 1e-5 and report["onnx"]["rows"] == report["parity"]["rows"]
    scorer = load(tmp_path / "artifact")
    session = onnxruntime.InferenceSession(tmp_path / "artifact" / "model.onnx")
    for count in (1, 2, 300):
        rows = odd_rows(count)
        given = onnx_inputs(scorer.schema, scorer.encoder.encode(rows))
        logits, found = session.run(["logits", "predictions"], given)
        np.testing.assert_allclose(found[:, 0], scorer.predict(rows)["click"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-6)
    assert found.std() > 1e-3
    graph = onnx.load(tmp_path / "artifact" / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "artifact" / "model.onnx"))
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    described = json.loads((tmp_path / "artifact" / "onnx.json").read_text())
    assert [one["name"] for one in described["inputs"]] == [one.name for one in session.get_inputs()]
    for mine, theirs in zip(described["inputs"], session.get_inputs(), strict=True):
        assert theirs.type == f"tensor({mine['type']})" and len(mine["shape"]) == len(theirs.shape)
        assert mine["feature"] and (mine["name"].endswith(".offsets") or mine["encoding"])
    # The tables are those of the artifact: the graph alone is small.
    assert (tmp_path / "artifact" / "model.onnx").stat().st_size < 500_000
    assert {one.key: one.value for t in graph.graph.initializer for one in t.external_data}["location"].startswith(
        "tables/"
    )


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_weighted_lists(uncompiled: None, tmp_path: Path, pooling: str) -> None:
    write_weighted(tmp_path)
    made = make_run(tmp_path / "run", tmp_path / "data", [*SMALL, f"--embeddings.pooling={pooling}"])
    assert export_run(made, tmp_path / "artifact", Form(onnx=True))["onnx"]["max_difference"] <= 1e-5
    names = [one["name"] for one in json.loads((tmp_path / "artifact" / "onnx.json").read_text())["inputs"]]
    assert names[-2:] == ["tags.weights", "words.weights"]


CHOSEN = ["tags", "user", "city", "price"]


def renamed(log: Path, **names: str) -> Restored:
    """A model of the log, some features of which have another name; nothing was trained or exported."""
    config, schema = load_config(None, SMALL), Schema.read(log).select(CHOSEN, None)
    features = [one.model_copy(update={"name": names.get(one.name, one.name)}) for one in schema.features]
    schema = schema.model_copy(update={"features": features})
    return Restored(randomised(build_plain_model(config, schema), 0), schema, config, log, log, {})


@pytest.mark.slow
def test_a_feature_may_be_called_as_a_value_of_the_graph(log: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert extension.load()
    restored = renamed(log, user="view", city="cat", price="table0", tags="tables")
    schema, layout = restored.schema, make_layout(restored.schema, restored.model.dense, "mean", "fp32")
    tables = stacked_tables(restored.model, schema, layout)
    graph = make_onnx(restored, layout, tables)
    for name, table in tables.items():
        np.save(tmp_path / f"{name}.npy", table.numpy())
    write_onnx(graph, schema, {name: f"{name}.npy" for name in tables}, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [one.name for one in session.get_inputs()][:3] == ["view", "cat", "table0"]
    batch = next(Reader(log, Schema.read(log).select(CHOSEN, None), "test", 64, num_lanes=1).batches(0, 0)).sparse
    sparse = KeyedJaggedTensor(schema.feature_names, batch.values(), lengths=batch.lengths())
    given = {}
    for name in schema.feature_names:
        if name == "tables":
            offsets = sparse[name].offsets().long().numpy()
            given |= {"tables.values": sparse[name].values().numpy(), "tables.offsets": offsets}
        else:
            given[name] = sparse[name].values().numpy()
    (logits,) = session.run(["logits"], given)
    with torch.no_grad():
        np.testing.assert_allclose(logits, restored.model(sparse).numpy(), atol=1e-5)
    assert logits.std() > 1e-3
    assert (tmp_path / "model.onnx").stat().st_size < 100_000  # every table is in its own file


@pytest.mark.parametrize("name", ["logits", "predictions"])
def test_two_inputs_or_outputs_of_one_name_are_refused(log: Path, name: str) -> None:
    restored = renamed(log, user=name)
    layout = make_layout(restored.schema, restored.model.dense, "mean", "fp32")
    with pytest.raises(UserError, match=f"two inputs or outputs of the ONNX graph would be called '{name}': rename"):
        make_onnx(restored, layout, {})


CONVERTED = {
    **{name: ENCODERS[name] for name in ("pool", "din", "target_attention")},
    "transformer": {**ENCODERS["transformer"], "positions": "index", "num_layers": 2},
    "hstu": {**ENCODERS["hstu"], "bias": "position"},
}


@pytest.mark.slow
@pytest.mark.parametrize("encoder", CONVERTED)
def test_sequences(uncompiled: None, tmp_path: Path, encoder: str) -> None:
    data = write_sequence_log(tmp_path / "log", {"train": 60, "validation": 30, "test": 300})
    made = make_run(tmp_path / "run", data, [*SMALL, f"--sequences.clicked.encoder={json.dumps(CONVERTED[encoder])}"])
    found = export_run(made, tmp_path / "artifact", Form(onnx=True))["onnx"]
    assert found["rows"] == 300 and found["max_difference"] <= 1e-5


def test_an_operator_without_an_onnx_form_is_named() -> None:
    restored = SimpleNamespace(config=resolve({"over_arch": CASES["mlp"]}, "test"))
    message = (
        "Failed to convert\n<class DispatchError>: No ONNX function found for <OpOverload(op='mine.odd', overload="
    )
    assert _refusal(restored, message) == (  # type: ignore[arg-type]
        "ONNX cannot have this model (over_arch 'mlp'): there is no operator mine.odd; export without --onnx"
    )


@pytest.mark.parametrize("encoder", ["hstu", "transformer"])
def test_an_encoder_that_reads_the_bits_of_ages_is_refused_by_name(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "LIBRARIES", ())
    data = write_sequence_log(tmp_path / "log", {"train": 60, "validation": 30, "test": 30})
    made = make_run(tmp_path / "run", data, [*SMALL, f"--sequences.clicked.encoder={json.dumps(ENCODERS[encoder])}"])
    with pytest.raises(UserError, match=rf"^ONNX cannot have encoder '{encoder}' of sequence 'clicked': .* train with"):
        export_run(made, tmp_path / "artifact", Form(onnx=True))
    assert not (tmp_path / "artifact").exists()


def test_forms_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in (Form("int8", onnx=True), Form(dense="bf16", onnx=True)):
        with pytest.raises(UserError, match="--onnx is float32: leave out --tables"):
            export_run(tmp_path / "none", tmp_path / "out", form)
    monkeypatch.setattr(onnx_export, "LIBRARIES", ("onnx_of_nobody",))
    with pytest.raises(UserError, match=r"ONNX needs onnx_of_nobody: pip install 'ssr_rec\[onnx\]'"):
        export_run(tmp_path / "none", tmp_path / "out", Form(onnx=True))


def test_what_stands_for_operators_that_onnx_lacks() -> None:
    rng = np.random.default_rng(0)
    for lengths in ([0, 3, 0, 0, 2, 1, 0], [0, 0], [4]):
        offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))
        ids, table = torch.from_numpy(rng.integers(0, 9, sum(lengths))), torch.randn(9, 4)
        weights = torch.rand(len(ids))
        for mode, own in ((0, None), (0, weights), (1, None)):
            found = _embedding_bag(table, ids, offsets, False, mode, False, own, True, None)[0]
            for row, (start, stop) in enumerate(pairwise(offsets)):
                rows = table[ids[start:stop]] * (1 if own is None else own[start:stop, None])
                wanted = rows.sum(0) / (max(1, stop - start) if mode else 1)
                torch.testing.assert_close(found[row], wanted)
        events = torch.arange(int(offsets[-1]) + 1)
        wanted = [sum(int(end) <= event for end in offsets[1:]) for event in events.tolist()]
        assert _searchsorted(offsets[1:], events, right=True).tolist() == wanted


@pytest.mark.parametrize("function", ["sigmoid", "identity", "exp", "softplus"])
def test_predictions_are_those_of_the_link(function: Any) -> None:
    link = Link(function=function, scale=2.5, shift=-1, inner_scale=1.5, inner_shift=0.2, least=-0.7)
    logits = torch.tensor([-300.0, -3.0, -0.1, 0.0, 0.7, 20.0, 300.0])
    with np.errstate(over="ignore"):
        wanted = link.predict(logits.numpy()).astype(np.float32)
    np.testing.assert_allclose(_predicted(logits, link).numpy(), wanted, rtol=1e-6)
