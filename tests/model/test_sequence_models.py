"""Sequences in the whole model: what an encoder is fed, equal losses on any number of ranks, resume, artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ssr_rec.config.run import RunConfig, resolve
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_dense
from ssr_rec.model.history_fields import bucket_ages
from ssr_rec.runs.report import read_report
from ssr_rec.serving.export import Form, export_run
from ssr_rec.serving.graph import ServingModel, make_layout, stacked_tables
from ssr_rec.serving.scorer import load
from ssr_rec.serving.trained_model import build_plain_model, restore_model
from tests.cases import one_quick
from tests.jobs import refused_job, stopped_job, train_job
from tests.made_run import make_run, randomised
from tests.ranks import run_ranks
from tests.sequence_log import write_sequence_log
from tests.serving.test_serving_model import served_inputs
from tests.test_train import losses

ENCODERS: dict[str, dict[str, Any]] = {
    "pool": {"name": "pool"},
    "din": {"name": "din", "hidden": [8]},
    "target_attention": {"name": "target_attention"},
    "transformer": {"name": "transformer", "dim": 16, "num_heads": 2},
    "hstu": {"name": "hstu", "dim": 16, "num_heads": 2, "bias": "position_age"},
}
ROWS = {"train": 1_003, "validation": 301, "test": 205}


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sequence_log(tmp_path_factory.mktemp("sequences") / "data", ROWS)


def config_of(encoder: str, over_arch: dict[str, Any] | None = None, **sequences: Any) -> RunConfig:
    chosen = {"clicked": {"encoder": ENCODERS[encoder]}, **sequences}
    over_arch = over_arch or {"name": "mlp", "hidden": [8]}
    return resolve({"over_arch": over_arch, "embeddings": {"dim": 8}, "sequences": chosen}, "test")


def first_batch(log: Path, rows: int = 100) -> tuple[Schema, Any]:
    schema = Schema.read(log)
    return schema, next(iter(Reader(log, schema, "test", batch_size=rows, num_lanes=1).epoch(0)))


def one_row(sparse: KeyedJaggedTensor, row: int) -> KeyedJaggedTensor:
    parts = {name: sparse[name] for name in sparse.keys()}  # noqa: SIM118
    ids = {n: jt.values()[int(jt.offsets()[row]) : int(jt.offsets()[row + 1])] for n, jt in parts.items()}
    lengths = torch.tensor([len(one) for one in ids.values()])
    return KeyedJaggedTensor(list(ids), torch.cat(list(ids.values())), lengths=lengths)


def test_the_input_vector_is_what_plain_indexing_gives(log: Path) -> None:
    """Fields in schema order without the events' columns, then the mean of the events, targets' columns first."""
    schema, batch = first_batch(log)
    model = build_plain_model(config_of("pool"), schema)
    seen: list[Tensor] = []
    model.dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(batch.sparse)
    event_tables = model.event_tables.embedding_bags  # type: ignore[union-attr]
    tables = {n: t.weight.detach() for n, t in {**model.tables.embedding_bags, **event_tables}.items()}
    assert sorted(event_tables) == ["clicked_age", "item", "kind"] and sorted(model.tables.embedding_bags) == [
        "tags",
        "user",
    ]
    for row in range(len(batch.labels)):
        ids = {name: jt.values() for name, jt in one_row(batch.sparse, row).to_dict().items()}

        def mean(name: str, table: str, ids: dict[str, Tensor] = ids) -> Tensor:
            rows = tables[table][ids[name]]
            return rows.mean(0) if len(rows) else torch.zeros(8)

        expected = [
            tables["user"][ids["user"][0]],
            tables["item"][ids["item_id"][0]],
            mean("tags", "tags"),
            tables["kind"][ids["kind_id"][0]],
            mean("viewed", "item"),
            mean("clicked_kind", "kind"),
            mean("clicked_item", "item"),
            mean("clicked_age", "clicked_age"),
        ]
        torch.testing.assert_close(seen[0][row], torch.cat(expected), atol=1e-6, rtol=0)
    assert model.dense.field_names[-3:] == ["clicked.pool0", "clicked.pool1", "clicked.pool2"]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("over_arch", one_quick({"name": "deepfm", "hidden": [8]}, {"name": "mlp", "hidden": [8]}))
def test_a_row_alone_and_served_has_the_logits_it_has_in_a_batch(log: Path, encoder: str, over_arch: Any) -> None:
    schema, batch = first_batch(log)
    config = config_of(encoder, over_arch, viewed={"encoder": ENCODERS["din"], "target": ["item_id"]})
    model = randomised(build_plain_model(config, schema), 3)
    layout = make_layout(schema, model.dense, "mean", "fp32")
    tables = list(stacked_tables(model, schema, layout).values())
    with torch.no_grad():
        logits = model(batch.sparse)
        alone = torch.cat([model(one_row(batch.sparse, row)) for row in range(len(logits))])
        served = ServingModel(model.dense, layout, False).eval()(
            *served_inputs(schema, batch, model.dense.histories.histories), tables
        )
    assert logits.std() > 1e-2
    torch.testing.assert_close(alone, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(served, logits, atol=1e-5, rtol=1e-5)
    assert sum(table.shape[0] for table in tables[:1]) == 40 + 25 + 12 + 7 + 9, "a shared table is stored once"


def test_the_order_of_events_is_kept_and_ages_are_those_of_their_buckets(log: Path) -> None:
    schema, batch = first_batch(log)
    model = randomised(build_plain_model(config_of("hstu"), schema), 3)
    age = next(feature for feature in schema.features if feature.name == "clicked_age")
    wanted = [0.0, *(np.expm1(5.0 / 8 * (bucket + 0.5)) for bucket in range(8))]
    np.testing.assert_allclose(bucket_ages(age).numpy(), wanted, rtol=1e-6)
    row = int((batch.sparse["clicked_item"].lengths() > 2).nonzero()[0])
    single = one_row(batch.sparse, row)
    values = {name: jt.values() for name, jt in single.to_dict().items()}
    values |= {name: values[name].flip(0) for name in ("clicked_item", "clicked_kind", "clicked_age")}
    turned = KeyedJaggedTensor(single.keys(), torch.cat(list(values.values())), lengths=single.lengths())
    with torch.no_grad():
        assert (model(turned) - model(single)).abs().max() > 1e-4


def options(log: Path, runs: Path, encoder: str, *more: str) -> list[str]:
    return [
        *("--over_arch.name=mlp", "--over_arch.hidden=[16]", "--embeddings.dim=8", "--train.batch_size=64"),
        *("--train.eval_batch_size=100", "--train.log_every=1", "--embeddings.learning_rate=0.05"),
        f"--sequences.clicked.encoder={json.dumps(ENCODERS[encoder])}",
        *(f"--data.path={log}", f"--runs={runs}", "--name=run", *more),
    ]


TABLES = ("user", "tags", "item", "kind", "clicked_age")
HALVES = ", ".join(f"{table}: {{min_partition: 4}}" for table in TABLES)
SHARDINGS = {
    "table_wise": ["--sharding.types=[table_wise]"],
    # Row-wise Adagrad would have a state for each half of a row.
    "column_wise": [
        "--sharding.types=[column_wise]",
        f"--sharding.per_table={{{HALVES}}}",
        *("--embeddings.optimizer=sgd", "--embeddings.learning_rate=1.0"),
    ],
    "row_wise": ["--sharding.types=[row_wise]"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "sharding"),
    [
        ("target_attention", "table_wise"),
        ("din", "column_wise"),
        ("din", "row_wise"),
        ("transformer", "row_wise"),
    ],
)
def test_world_size_does_not_change_the_losses(log: Path, tmp_path: Path, encoder: str, sharding: str) -> None:
    for world_size in (1, 2, 4):
        more = [*SHARDINGS[sharding], "--train.epochs=4"]
        report = run_ranks(train_job, world_size, options(log, tmp_path / str(world_size), encoder, *more))[0]
        assert report["sequences"]["clicked"]["encoder"] == encoder
    alone = losses(tmp_path / "1")
    assert len(alone) == 64 and alone[-8:].mean() < alone[:8].mean() - 0.01
    for world_size in (2, 4):
        assert np.abs(losses(tmp_path / str(world_size)) - alone)[:50].max() < 1e-5


def test_two_ranks_train_as_one(log: Path, tmp_path: Path) -> None:
    """The quick form of the test above, two kinds of sharding in one model."""
    for world_size in (1, 2):
        mixed = ["--sharding.types=[row_wise]", "--sharding.per_table={kind: {types: [column_wise]}}"]
        more = [*mixed, "--embeddings.optimizer=lazy_adam", "--train.max_steps=10"]
        run_ranks(train_job, world_size, options(log, tmp_path / str(world_size), "target_attention", *more))
    assert np.abs(losses(tmp_path / "1") - losses(tmp_path / "2")).max() < 1e-5
    alone, two = (read_report(tmp_path / str(n) / "run").sequences["clicked"] for n in (1, 2))
    assert two["events"] == alone["events"] and sum(alone["events"]) > ROWS["test"]
    assert two["shares"] == pytest.approx(alone["shares"], rel=1e-3)


@pytest.mark.slow
def test_world_size_does_not_change_the_losses_of_hstu(log: Path, tmp_path: Path) -> None:
    """Its normalisation of small sums amplifies rounding some 1.3 times a step, hence fewer steps."""
    for world_size in (1, 2, 4):
        more = ["--embeddings.optimizer=sgd", "--embeddings.learning_rate=1.0", "--train.max_steps=12"]
        run_ranks(train_job, world_size, options(log, tmp_path / str(world_size), "hstu", *more))
    for world_size in (2, 4):
        assert np.abs(losses(tmp_path / str(world_size)) - losses(tmp_path / "1")).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "before", "after"), [("table_wise", 2, 1), ("row_wise", 2, 1), ("row_wise", 2, 4)]
)
def test_resuming_on_another_number_of_ranks(log: Path, tmp_path: Path, sharding: str, before: int, after: int) -> None:
    more = [*SHARDINGS[sharding], "--train.epochs=2"]
    run_ranks(train_job, 2, options(log, tmp_path / "whole", "din", *more))
    parts = options(log, tmp_path / "parts", "din", *more)
    run_ranks(stopped_job, 2, parts, 20)
    run_ranks(train_job, after, parts)
    assert np.abs(losses(tmp_path / "parts") - losses(tmp_path / "whole")).max() < 1e-6


@pytest.mark.slow
def test_rows_of_two_ranks_warm_start_and_export_as_whole_tables(log: Path, tmp_path: Path) -> None:
    steps = ["--train.max_steps=12", "--train.eval_every=12"]
    run_ranks(train_job, 2, options(log, tmp_path / "first", "din", *SHARDINGS["row_wise"], *steps))
    run = tmp_path / "first" / "run"
    exported = export_run(run, tmp_path / "artifact")
    assert exported["parity"]["rows"] == ROWS["test"]
    [checkpoint] = (run / "checkpoints").glob("best*")
    warm = [*steps, f"--warm_start={checkpoint}"]
    run_ranks(train_job, 1, options(log, tmp_path / "alone", "din", *SHARDINGS["table_wise"], *warm))
    run_ranks(train_job, 2, options(log, tmp_path / "rows", "din", *SHARDINGS["row_wise"], *warm))
    run_ranks(train_job, 1, options(log, tmp_path / "cold", "din", *steps))
    assert np.abs(losses(tmp_path / "rows") - losses(tmp_path / "alone")).max() < 1e-5
    assert np.abs(losses(tmp_path / "rows") - losses(tmp_path / "cold")).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "tables", "dice"), [("hstu", "fp32", []), ("din", "int8", ["dice"])])
def test_an_artifact_scores_as_the_run(log: Path, tmp_path: Path, encoder: str, tables: Any, dice: list[str]) -> None:
    more = [f"--sequences.clicked.encoder.activation={name}" for name in dice]
    every = options(log, tmp_path, encoder, *more)
    wanted = [option for option in every if "runs" not in option and "name=run" not in option]
    run = make_run(tmp_path / "run", log, wanted)
    exported = export_run(run, tmp_path / "artifact", Form(tables))
    assert exported["parity"]["rows"] == ROWS["test"]
    scorer, restored = load(tmp_path / "artifact"), restore_model(run)
    _, batch = first_batch(log)
    with torch.no_grad():
        logits = restored.model(batch.sparse)
        empty = int((batch.sparse["clicked_item"].lengths() == 0).nonzero()[0])
        for row in (0, empty):  # the compiled program has no form for no events at all
            single = one_row(batch.sparse, row)
            torch.testing.assert_close(
                scorer.score(single)[0], logits[row], atol=1e-5 if tables == "fp32" else 0.05, rtol=0
            )


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ({"clickd": {}}, "sequences.clickd: dataset 'sequences' has no such sequence; it has clicked, tags, viewed"),
        ({"tags": {"encoder": {"name": "din"}}}, "sequences.tags.encoder: din needs a target, and no single-valued"),
        ({"clicked": {"target": ["user"]}}, "sequences.clicked.target: 'user' is not of the vocabulary of any column"),
        ({"clicked": {"target": ["itm"]}}, "sequences.clicked.target: 'itm' is no feature of the dataset"),
        (
            {"clicked": {"encoder": {"name": "target_attention", "num_heads": 7}}},
            "sequences.clicked.encoder: .*num_heads=7",
        ),
        (
            {"viewed": {"encoder": {"name": "hstu", "bias": "age"}}},
            "sequences.viewed.encoder: hstu needs the ages of the events",
        ),
        ({"clicked": {"encoder": {"name": "pool", "fields": 2, "mode": "most"}}}, "sequences.clicked.encoder"),
    ],
)
def test_bad_settings_are_refused_in_a_line(log: Path, sequences: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        build_dense(resolve({"embeddings": {"dim": 8}, "sequences": sequences}, "test"), Schema.read(log))
    assert "\n" not in str(refused.value)


def test_settings_of_a_shared_table_name_the_table(log: Path) -> None:
    [refused] = run_ranks(refused_job, 1, options(log, log.parent / "runs", "din", "--embeddings.dims={item_id: 12}"))
    assert refused == "embeddings.dims names 'item_id', whose table is 'item': name that"
