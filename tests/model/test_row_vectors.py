"""Vectors that rows bring: checked, stored, and the same in training, in scoring and of every container of raw rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from ssr_rec.common.errors import UserError
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.explaining.rows import SplitRows
from ssr_rec.serving.export import Compared, export_run
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.run_scorer import RunScorer
from ssr_rec.serving.scorer import load
from ssr_rec.serving.user_once import encode_user_once
from tests.made_run import make_run

E = 5
SPEC: dict[str, Any] = {
    "name": "pictures",
    "labels": ["click"],
    "categorical": ["user"],
    "dense": {"price": "log"},
    "row_vectors": {"thumb": E, "pair": 2},
    "min_count": 1,
    "split": {"type": "time", "column": "row", "boundaries": [200, 250]},
}
SMALL = ["--over_arch.name=deepfm", "--over_arch.hidden=[16]", "--embeddings.dim=8"]


def rows(count: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    thumb = rng.normal(size=(count, E))
    return pd.DataFrame(
        {
            "click": rng.integers(0, 2, count),
            "user": rng.integers(0, 9, count),
            "price": rng.normal(size=count),
            "thumb": [None if n % 10 == 3 else [] if n % 10 == 4 else v.tolist() for n, v in enumerate(thumb)],
            "pair": [[n, -n] for n in range(count)],
            "row": np.arange(count),
        }
    )


def write(folder: Path, log: pd.DataFrame, **changes: Any) -> Schema:
    folder.mkdir(exist_ok=True)
    log.to_parquet(folder / "log.parquet")
    return prepare([str(folder / "log.parquet")], folder / "data", make_spec({**SPEC, **changes}, "test"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write(folder, rows())
    return folder / "data"


def encoder_of(data: Path) -> Encoder:
    return Encoder(Schema.read(data), data)


def wanted(log: pd.DataFrame) -> np.ndarray:
    thumbs = [[np.nan] * E if v is None or not len(v) else v for v in log["thumb"]]
    return np.concatenate([np.array(thumbs), np.array(log["pair"].tolist())], axis=1).astype(np.float32)


def test_rows_have_the_same_vectors_everywhere(data):
    schema, log = Schema.read(data), rows()
    encoder, expected = encoder_of(data), wanted(rows())
    table = pa.Table.from_pandas(log)
    arrays = log.assign(thumb=[None if v is None else np.array(v) for v in log["thumb"]])
    for given in (log, arrays, log.to_dict("records"), table, table.to_batches()[0]):
        found = encoder.encode(given).dense
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[:, 1:], expected)
    for split, part in (("train", slice(0, 200)), ("test", slice(250, 300))):
        batch = next(iter(Reader(data, schema, split, 4096, num_lanes=1).batches(0, 0))).dense.numpy()
        order = np.argsort(batch[:, -2])  # pair[0] is the number of the row
        np.testing.assert_array_equal(batch[order], encoder.encode(log[part]).dense)
    listed = log.to_dict("records")[:4]
    for shared in (["thumb"], ["price", "pair"], ["user", "price", "thumb", "pair"]):
        same = [{**row, **{name: listed[0][name] for name in shared}} for row in listed]
        own = [{key: value for key, value in row.items() if key not in shared} for row in same]
        once = encode_user_once(encoder, {name: listed[0][name] for name in shared}, own)
        np.testing.assert_array_equal(once.dense, encoder.encode(same).dense)


def test_the_model_maps_them_to_fields_behind_the_numbers(data, tmp_path):
    scorer, log = RunScorer(make_run(tmp_path / "run", data, SMALL)), rows()
    dense = scorer.restored.model.dense
    assert dense.field_names == ["user", "dense.mlp", "thumb", "pair"]
    seen: list[torch.Tensor] = []
    dense.over_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert np.std(scorer.predict(log)["click"]) > 0.01
    plain = np.nan_to_num(wanted(log))
    missing = np.isnan(wanted(log)[:, :1]).astype(np.float32)
    parts = [np.concatenate([plain[:, :E], missing], 1), np.concatenate([plain[:, E:], 0 * missing], 1)]
    for field, linear, part in zip(seen[0][:, -16:].split(8, 1), dense.row_vectors.linears, parts, strict=True):
        out = part @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        np.testing.assert_allclose(field.detach().numpy(), out, rtol=1e-4, atol=1e-4)
    held = SplitRows.read(data, scorer.restored.schema, "test")
    order = np.arange(50)[::-1]
    moved = held.exchanged(["thumb"], order).block.dense
    np.testing.assert_array_equal(moved[:, 1 : 1 + E], held.block.dense[order, 1 : 1 + E])
    np.testing.assert_array_equal(moved[:, [0, -2, -1]], held.block.dense[:, [0, -2, -1]])
    chosen = scorer.restored.schema.select(["user", "pair"], None)
    assert chosen.dense_names == ["pair"] and chosen.dense_widths == [2]


def test_wrong_vectors_are_refused_in_one_line(tmp_path, data):
    good = rows()["thumb"][0]
    encoder = encoder_of(data)
    cases: list[tuple[Any, str]] = [
        (good[:-1], f"holds {E - 1} numbers; a vector of 'thumb' has {E}"),
        ([*good[:-1], np.nan], "holds a number that is missing, infinite or beyond float32"),
        ([*good[:-1], np.inf], "inf"),
        ([*good[:-1], 1e300], "holds a number that is missing, infinite or beyond float32"),
        ("text", "not a list"),
        (["a"] * E, "not a number"),
    ]
    for vector, words in cases:
        with pytest.raises(UserError, match=rf"row 1: vector 'thumb' .*{words}"):
            encoder.encode([{"thumb": good}, {"thumb": vector}])
    for number, (vector, _) in enumerate(cases[:3]):
        log = rows()
        log.at[7, "thumb"] = vector
        with pytest.raises(UserError, match=rf"row 8: column 'thumb' is \[.*a vector has {E} finite numbers"):
            write(tmp_path / f"bad{number}", log)
    with pytest.raises(UserError, match="'thumb' of row_vectors holds string, not lists of numbers"):
        write(tmp_path / "text", rows().assign(thumb="1,2,3,4,5"))


@pytest.mark.slow
def test_an_artifact_scores_them_to_the_bit(data, tmp_path):
    run = make_run(tmp_path / "run", data, SMALL)
    export_run(run, tmp_path / "artifact", compared=Compared(split="test"))
    scorer = load(tmp_path / "artifact")
    batch = next(iter(Reader(data, Schema.read(data), "test", 4096, num_lanes=1).batches(0, 0)))
    # In the order of the prepared rows, as the last bit may depend on a row's place.
    again = rows().iloc[batch.dense[:, -2].long().tolist()]  # pair[0] is the number of the row
    assert torch.equal(scorer.score(batch), scorer.score_arrays(*scorer.encoder.encode(again)))
