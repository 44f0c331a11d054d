"""The fields of raw floats: the formulas by plain loops, their place in the input vector, and the job on two ranks."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssr_rec.config.dense import DenseConfig
from ssr_rec.config.run import load_config
from ssr_rec.data.dense import DenseColumn
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.importance import column_groups, permutation_importance
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.model.dense_fields import DenseFields
from ssr_rec.planning.cases import Case, make_world, read_tables
from ssr_rec.planning.costs import dense_cost
from ssr_rec.planning.hardware import load_hardware
from ssr_rec.runs.folder import read_metrics
from ssr_rec.serving.export import Compared, export_run
from ssr_rec.serving.run_scorer import RunScorer
from ssr_rec.serving.score_file import score_file
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import restore_model
from tests.dense_log import frame, write_dense
from tests.jobs import train_job
from tests.made_run import make_run
from tests.ranks import run_ranks

EDGES = {"a": [-1.0, -0.25, 0.5, 2.0], "b": [0.0, 1.0]}
COLUMNS = [DenseColumn(name=name, scale="standard", mean=0, std=1, edges=edges) for name, edges in EDGES.items()]
NUMBERS = [[-3.0, 0.25], [-1.0, 7.0], [0.0, math.nan], [0.5, -2.0], [9.0, 1.0], [math.nan, 0.5]]
DEEPFM = ["--over_arch.name=deepfm", "--over_arch.hidden=[16]", "--embeddings.dim=8"]
WAYS = {
    "mlp": ["--dense.hidden=[8, 4]", "--dense.fields=2"],
    "linear": ["--dense.arch=linear"],
    "piecewise": ["--dense.encoding=piecewise", "--dense.hidden=[]"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, frame())
    return folder / "data"


def encoded(value: float, edges: list[float], bins: int) -> list[float]:
    """Section 3.2 of the paper, a case at a time."""
    if math.isnan(value):
        return [0.0] * bins
    parts = []
    for t in range(1, len(edges)):
        if value < edges[t - 1] and t > 1:
            parts.append(0.0)
        elif value >= edges[t] and t < len(edges) - 1:
            parts.append(1.0)
        else:
            parts.append((value - edges[t - 1]) / (edges[t] - edges[t - 1]))
    return parts + [0.0] * (bins - len(parts))


@pytest.mark.parametrize("encoding", ["scaled", "piecewise"])
@pytest.mark.parametrize("arch", ["linear", "mlp"])
def test_fields_are_those_of_plain_loops(encoding, arch):
    config = DenseConfig(encoding=encoding, arch=arch)
    fields = DenseFields(COLUMNS, config, field_dim=4)
    found = fields(torch.tensor(NUMBERS))
    for row, numbers in enumerate(NUMBERS):
        parts = []
        for value, edges in zip(numbers, EDGES.values(), strict=True):
            entry = encoded(value, edges, 3) if encoding == "piecewise" else [0.0 if math.isnan(value) else value]
            parts.append(torch.tensor([*entry, float(math.isnan(value))]))
        if arch == "linear":
            assert fields.linear is not None and fields.names == ["a", "b"]
            both = zip(parts, fields.linear.weight, fields.linear.bias, strict=True)
            wanted = torch.cat([part @ weight + bias for part, weight, bias in both])
        else:
            first, second = fields.layers
            wanted = second.weight @ torch.relu(first.weight @ torch.cat(parts) + first.bias) + second.bias
        torch.testing.assert_close(found[row], wanted)
    assert found.shape == (6, sum(fields.dims))


@pytest.mark.parametrize("way", WAYS)
def test_raw_rows_score_as_prepared_ones_and_fields_come_last(data, tmp_path, way):
    run = make_run(tmp_path / "run", data, [*DEEPFM, *WAYS[way]])
    restored = restore_model(run)
    batch = next(iter(Reader(data, restored.schema, "validation", 4096, num_lanes=1).batches(0, 0)))
    seen: list[tuple[torch.Tensor, ...]] = []
    dense = restored.model.dense
    dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        logits = restored.model(batch.sparse, batch.dense)
        own = dense.numbers(batch.dense)
        # One task: first-order weights of one column, those of the numbers by a linear map.
        assert torch.equal(seen[0][0][:, -own.shape[1] :], own)
        assert torch.equal(seen[0][1][:, -len(dense.numbers.dims) :], dense.extra_of_histories[0](own))
    added = {"mlp": ["dense.mlp0", "dense.mlp1"], "linear": ["price", "age", "never"], "piecewise": ["dense.mlp"]}[way]
    assert dense.field_names == ["user", "tags", *added]
    log = frame().iloc[400:500]
    found = RunScorer(run).predict(log)["click"]
    # The prepared rows are shuffled; each is found by its own numbers.
    keys = [tuple(row) for row in np.nan_to_num(RunScorer(run).encoder.encode(log).dense).tolist()]
    prepared = dict(zip(map(tuple, batch.dense.nan_to_num().tolist()), logits.sigmoid()[:, 0].tolist(), strict=True))
    np.testing.assert_allclose(found, [prepared[key] for key in keys], rtol=2e-6, atol=1e-7)
    assert np.std(found) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mlp", "piecewise"])
def test_an_artifact_scores_raw_rows_as_prepared_ones_to_the_bit(data, tmp_path, way):
    run = make_run(tmp_path / "run", data, [*DEEPFM, *WAYS[way]])
    export_run(run, tmp_path / "artifact", compared=Compared(split="test"))
    scorer, log = load(tmp_path / "artifact"), frame().iloc[400:500]
    batch = next(iter(Reader(data, Schema.read(data), "validation", 4096, num_lanes=1).batches(0, 0)))
    # In the order of the prepared rows, as the last bit may depend on a row's place.
    raw = np.nan_to_num(scorer.encoder.encode(log).dense).tolist()
    place = {tuple(numbers): number for number, numbers in enumerate(raw)}
    again = log.iloc[[place[tuple(numbers)] for numbers in batch.dense.nan_to_num().tolist()]]
    assert torch.equal(scorer.score(batch), scorer.score_arrays(*scorer.encoder.encode(again)))
    found = scorer.predict(log)["click"]
    log.drop(columns="tags").assign(tags=[list(t) for t in log["tags"]]).to_parquet(tmp_path / "rows.parquet")
    score_file(scorer, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    np.testing.assert_array_equal(pd.read_parquet(tmp_path / "out.parquet")["p_click"], found)
    with pytest.raises(ValueError, match=r"numbers of shape None for 1 rows and 3"):
        scorer.score_arrays(np.zeros((1, 1), np.int64), [(np.zeros(0, np.int64), np.zeros(2, np.int64))])


@pytest.mark.slow
def test_a_run_learns_from_floats_on_two_ranks_as_on_one(data, tmp_path):
    losses = {}
    options = [*DEEPFM, *WAYS["linear"], f"--data.path={data}", f"--runs={tmp_path}", "--train.batch_size=64"]
    options += ["--optimizer.learning_rate=0.01", "--train.epochs=3", "--train.log_every=1", "--data.num_lanes=4"]
    for ranks in (1, 2):
        report = run_ranks(train_job, ranks, [*options, f"--name=w{ranks}"])[0]
        rows = read_metrics(tmp_path / f"w{ranks}" / "metrics.jsonl")
        losses[ranks] = np.array([row["loss"] for row in rows if row["split"] == "train"])
    assert len(losses[1]) == 21 and losses[1][-1] < losses[1][0] - 0.02
    np.testing.assert_allclose(losses[2], losses[1], rtol=2e-5)
    assert report["test"]["click"]["auc"] > 0.5


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_losses(data, tmp_path):
    options = [*DEEPFM, *WAYS["mlp"], f"--data.path={data}", "--train.batch_size=64", "--train.log_every=1"]
    options += ["--data.num_lanes=4", "--checkpoint.every_steps=3", "--train.epochs=2"]
    run_ranks(train_job, 1, [*options, f"--runs={tmp_path / 'whole'}", "--name=run"])
    begun = [*options, f"--runs={tmp_path / 'parts'}"]
    run_ranks(train_job, 1, [*begun, "--name=first", "--train.max_steps=6"])
    run_ranks(train_job, 2, [*begun, "--name=run", f"--resume={tmp_path / 'parts' / 'first'}"])
    whole, parts = (
        {
            row["step"]: row["loss"]
            for row in read_metrics(tmp_path / part / "run" / "metrics.jsonl")
            if row["split"] == "train"
        }
        for part in ("whole", "parts")
    )
    assert min(parts) == 7 and set(parts) < set(whole)
    for step, loss in parts.items():
        assert loss == pytest.approx(whole[step], rel=2e-5)


def test_importance_finds_the_float_that_the_model_goes_by(data, tmp_path):
    restored = restore_model(make_run(tmp_path / "run", data, [*DEEPFM, *WAYS["linear"]]))
    rows = SplitRows.read(data, restored.schema, "validation")
    groups = column_groups(restored.schema, {"both": ["age", "user"]})
    assert {"price", "age", "never", "both"} < set(groups)
    found = {one.name: one for one in permutation_importance(restored.model, rows, groups, [0, 1])}
    assert found["never"].total == 0.0 and found["age"].total != 0.0
    order = np.arange(len(rows.block.labels))[::-1]
    moved = rows.exchanged(["age"], order).block.dense
    np.testing.assert_array_equal(moved[:, 1], rows.block.dense[order, 1])
    np.testing.assert_array_equal(moved[:, 0], rows.block.dense[:, 0])


def test_the_planner_counts_the_bottom_mlp(tmp_path):
    (tmp_path / "tables.yaml").write_text("dense: 5\ndense_bins: 7\ntables: [{name: user, rows: 100}]\n")
    costs = {}
    for hidden, encoding in ((16, "scaled"), (48, "scaled"), (16, "piecewise")):
        options = [*DEEPFM, f"--dense.hidden=[{hidden}]", f"--dense.encoding={encoding}"]
        config, schema, lengths = read_tables(tmp_path / "tables.yaml", load_config(None, options))
        costs[hidden, encoding] = dense_cost(Case(config, schema, lengths, make_world(1, 2, load_hardware("h100"))))
    base, wide, piecewise = costs.values()
    assert wide.parameters - base.parameters == 32 * (5 * 2 + 1 + 8)
    assert wide.matmul_flops - base.matmul_flops == 2 * 32 * (5 * 2 + 8)
    assert piecewise.matmul_flops - base.matmul_flops == 2 * 16 * 5 * (8 - 2)
    assert wide.activation_bytes - base.activation_bytes >= 4 * 32
    assert base.buffer_bytes < piecewise.buffer_bytes
