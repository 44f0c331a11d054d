"""The served graph, before it is compiled, against the trainer's modules; packed tables against plain formulas."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_rec.config.run import RunConfig, resolve
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.serving.graph import ServingModel, make_layout, stacked_tables
from ssr_rec.serving.quantized_tables import pack, pooled, stored_as
from ssr_rec.serving.trained_model import build_plain_model
from tests.made_run import randomised
from tests.over_archs.test_contract import CASES, EQUAL_DIMS_ONLY

MIXED = {"dims": {"user": 12, "tags": 4, "price": 12}}


def config_of(case: dict[str, Any], **embeddings: Any) -> RunConfig:
    return resolve({"over_arch": {**case}, "embeddings": {"dim": 8, **embeddings}}, "test")


def served_inputs(schema: Schema, batch: Any, histories: Sequence[Any] = ()) -> tuple[Any, ...]:
    """What the graph takes, written apart from the scorer: ids by feature; ids and offsets of each list; who has it."""
    singles, lists = [], []
    for feature in schema.features:
        ids = batch.sparse[feature.name]
        if feature.kind != "list":
            singles.append(ids.values())
            continue
        lists += [ids.values(), torch.tensor(np.concatenate([[0], np.cumsum(ids.lengths().numpy())]))]
    rows = len(batch.labels)
    events = [torch.arange(len(batch.sparse[history.columns[0].name].values())) for history in histories]
    sharing = [torch.arange(rows)] * (len(lists) // 2) + events
    return torch.stack([torch.zeros(rows, dtype=torch.int64), *singles])[1:], lists, sharing


def both(dataset: Path, config: RunConfig, precision: Any = "fp32", bf16: bool = False) -> tuple[torch.Tensor, ...]:
    schema = Schema.read(dataset).select(config.data.features, None)
    model = randomised(build_plain_model(config, schema), 3)
    layout = make_layout(schema, model.dense, config.embeddings.pooling, precision)
    tables = list(stacked_tables(model, schema, layout).values())
    batch = next(iter(Reader(dataset, schema, "test", batch_size=100).epoch(0)))
    with torch.no_grad():
        served = ServingModel(model.dense, layout, bf16).eval()(*served_inputs(schema, batch), tables)
        return served, model(batch.sparse)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "switched" in case else []) for case in CASES]
)
@pytest.mark.parametrize("dims", [{}, MIXED], ids=["equal dims", "dims per field"])
def test_every_over_arch_is_served_as_it_was_trained(dataset, case, dims):
    if dims and CASES[case]["name"] in EQUAL_DIMS_ONLY:
        pytest.skip("needs equal dims")
    served, trained = both(dataset, config_of(CASES[case], **dims))
    # A logit is a sum of terms as large as the largest logit: their rounding stays where they cancel.
    torch.testing.assert_close(served, trained, atol=2e-6 * float(trained.abs().max()), rtol=0)
    assert served.std(0).min() > 1e-3, "the rows must differ"


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("features", [["tags", "user", "history", "price"], ["history", "tags"], ["item", "user"]])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_fields_keep_their_order_and_pooling(dataset, pooling, features, precision):
    config = config_of({"name": "mlp", "hidden": [8]}, pooling=pooling)
    config = config.model_copy(update={"data": config.data.model_copy(update={"features": features})})
    served, trained = both(dataset, config, precision)
    assert (served - trained).abs().max() < (1e-6 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("case", ["ssr-s", "deepfm"])
def test_each_precision_is_nearer_than_the_next(dataset, case):
    differences = []
    for precision in ("fp32", "fp16", "int8", "int4"):
        served, trained = both(dataset, config_of(CASES[case]), precision)
        differences.append(float((served - trained).abs().mean()))
    assert differences[0] < 1e-6 and differences == sorted(differences) and differences[3] < 0.2
    assert differences[1] * 2 < differences[2] and differences[2] * 5 < differences[3]


def test_bf16_is_what_training_in_bf16_computes(dataset):
    config = config_of(CASES["mlp"])
    trained_so = config.model_copy(update={"train": config.train.model_copy(update={"bf16": True})})
    served, trained = both(dataset, trained_so, bf16=True)
    assert torch.equal(served, trained)
    assert not torch.equal(served, both(dataset, config)[1])


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 15)])
@pytest.mark.parametrize("columns", [4, 12, 64])
def test_integers_are_within_half_a_step_of_each_row(precision, levels, columns):
    table = torch.randn(50, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, 50)[:, None]
    packed = pack(table, precision)
    assert packed.nbytes == 50 * (columns + 8 if precision == "int8" else columns / 2 + 4)
    ids = torch.tensor([3, 49, 0, 3])
    found = pooled(packed, precision, ids, torch.arange(5))
    step = (table.amax(1) - table.amin(1)) / levels
    # The scales of int4 are rounded to float16 themselves.
    slack = 1e-5 if precision == "int8" else 0.02
    assert found.shape == (4, columns)
    assert ((found - table[ids]).abs().amax(-1) <= step[ids] * (0.5 + slack) + slack * table[ids].abs().amax(-1)).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_sums_and_means_of_their_rows(precision, mode):
    packed = pack(torch.randn(30, 8, generator=torch.Generator().manual_seed(2)), precision)
    rows = pooled(packed, precision, torch.arange(30), torch.arange(31))
    ids, offsets = torch.tensor([4, 9, 9, 29, 1]), torch.tensor([0, 0, 3, 4, 4, 5])
    found = pooled(packed, precision, ids, offsets, mode)
    wanted = torch.stack(
        [rows[ids[a:b]].sum(0) / (max(1, b - a) if mode == "mean" else 1) for a, b in pairwise(offsets)]
    )
    torch.testing.assert_close(found, wanted, atol=5e-3 if precision == "fp16" else 1e-6, rtol=0)


def test_narrow_and_odd_tables():
    assert [stored_as("int4", columns) for columns in (1, 3, 4, 5, 6)] == ["fp32", "fp32", "int4", "int8", "int4"]
    for columns in (1, 3):
        table = torch.randn(5, columns)
        assert torch.equal(pack(table, "int4"), table)
