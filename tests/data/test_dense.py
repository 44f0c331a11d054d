"""Raw floats: fitted on training rows alone, the same numbers in every batch and of every container of raw rows."""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssr_rec.checkpointing import warm_rows
from ssr_rec.checkpointing.warm_rows import Here, Origin, row_maps
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.data.batch import row_keys
from ssr_rec.data.dense import MAX_SCALED, DenseColumn, scaled
from ssr_rec.data.preparation import fit_dense
from ssr_rec.data.preparation.spec import make_spec
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_dense
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.server_batcher import _joined
from ssr_rec.serving.user_once import encode_user_once
from tests.dense_log import SPEC, frame, write_dense


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, frame())
    return folder / "data"


def t(value: float, scale: str) -> float:
    return value if scale == "standard" else math.copysign(math.log(1 + abs(value)), value)


def batch_of(data: Path, split: str) -> torch.Tensor:
    reader = Reader(data, Schema.read(data), split, 4096, num_lanes=1)
    dense = next(iter(reader.batches(0, 0))).dense
    assert dense is not None
    return dense


def test_scales_and_bins_are_those_of_the_training_rows(made):
    log = frame()[:400]
    for column in Schema.read(made).dense:
        raw = log[column.name].dropna().tolist()
        if column.name == "never":
            assert (column.mean, column.std, column.edges) == (0.0, 1.0, [0.0, 1.0])
            continue
        found = [t(value, column.scale) for value in raw]
        assert column.mean == pytest.approx(statistics.fmean(found), rel=1e-12, abs=1e-14)
        assert column.std == pytest.approx(statistics.pstdev(found), rel=1e-12)
        z = sorted((value - column.mean) / column.std for value in found)
        assert (
            len(column.edges) == 6
            and column.edges[0] == pytest.approx(z[0])
            and column.edges[-1] == pytest.approx(z[-1])
        )
        shares = [sum(low <= value < high for value in z) / len(z) for low, high in pairwise(column.edges)]
        assert all(abs(share - 0.2) < 0.01 for share in shares), shares


@pytest.mark.parametrize("scale", ["standard", "log"])
def test_a_column_of_one_number_has_a_deviation_of_1_whatever_its_sum_rounds_to(scale):
    rounded = 0
    for value in (0.1, 1.1, 123.456, -700000.1):
        for rows in (3, 40, 99):
            column = fit_dense._fitted("same", np.full(rows, value), scale, 4)
            assert (column.std, column.edges) == (1.0, [0.0, 1.0])
            assert scaled(np.array([value, value + 0.5]), column).tolist()[0] == 0.0
            rounded += math.fsum([t(value, scale)] * rows) / rows != t(value, scale)
    assert rounded


def test_a_batch_holds_the_scaled_numbers_and_shards_the_raw_ones(made):
    schema = Schema.read(made)
    for split in schema.splits:
        table = pq.read_table(made / split / "00000.parquet")
        found = batch_of(made, split).numpy()
        for place, column in enumerate(schema.dense):
            raw = table[column.name].to_pylist()
            wanted = [math.nan if v is None else (t(v, column.scale) - column.mean) / column.std for v in raw]
            np.testing.assert_array_equal(found[:, place], np.array(wanted, dtype=np.float32))
    assert np.isnan(batch_of(made, "train")[:, 1]).any() and np.nanmean(batch_of(made, "test")[:, 1]) > 3


def test_raw_rows_have_the_numbers_of_the_batch(made, tmp_path):
    schema, log = Schema.read(made), frame()
    encoder = Encoder(schema, made)
    rows = log.to_dict("records")
    parts = [
        log,
        rows,
        pa.Table.from_pandas(log),
        pa.Table.from_pandas(log.astype({"price": "float64"})).to_batches()[0],
    ]
    found = [encoder.encode(part) for part in parts]
    # The training rows are shuffled, so they are found by their own raw number.
    table, own = pq.read_table(made / "train" / "00000.parquet"), batch_of(made, "train").numpy()
    by_price = dict(zip(table["price"].to_pylist(), own, strict=True))
    for encoded in found:
        assert encoded.dense is not None and encoded.dense.dtype == np.float32
        for price, numbers in zip(log["price"][:400], encoded.dense, strict=False):
            np.testing.assert_array_equal(numbers, by_price[price])
    # One by one, joined by the server, and with what all candidates share given once.
    joined = _joined([encoder.encode([row]) for row in rows[:7]])
    np.testing.assert_array_equal(joined.dense, found[0].dense[:7])
    for shared in ([], ["user", "age"], ["price"], ["tags", "price", "age", "never"]):
        same = [{**row, **{name: rows[0][name] for name in shared}} for row in rows[:5]]
        own_columns = [{key: value for key, value in row.items() if key not in shared} for row in same]
        once = encode_user_once(encoder, {name: rows[0][name] for name in shared}, own_columns)
        wanted = encoder.encode(same)
        np.testing.assert_array_equal(once.dense, wanted.dense)
        np.testing.assert_array_equal(once.ids, wanted.ids)


def test_numbers_far_outside_are_clipped_and_integers_taken(made):
    column = DenseColumn(name="x", scale="standard", mean=1.0, std=2.0, edges=[0.0, 1.0])
    assert scaled(np.array([1e300, -1e300, 3.0, np.nan]), column).tolist()[:3] == [MAX_SCALED, -MAX_SCALED, 1.0]
    encoder = Encoder(Schema.read(made), made)
    as_int, as_float = (encoder.encode([{"price": kind(7), "age": True}]).dense for kind in (int, float))
    np.testing.assert_array_equal(as_int, as_float)
    assert not np.isnan(as_int[0, :2]).any() and np.isnan(as_int[0, 2])


def test_a_sample_of_the_rows_is_fitted_on_where_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_dense, "FITTED_ROWS", 100)
    schema = write_dense(tmp_path, frame())
    whole = frame()["price"][:400].map(lambda v: t(v, "log"))
    price = schema.dense[0]
    assert price.mean != whole.mean() and abs(price.mean - whole.mean()) < 4 * whole.std() / 10


def test_rows_that_differ_in_a_number_alone_are_not_tied(made):
    batch = next(iter(Reader(made, Schema.read(made), "train", 4096, num_lanes=1).batches(0, 0)))
    other = batch.dense.clone()
    other[5, 0] += 1
    keys, changed = row_keys(batch.sparse, batch.dense), row_keys(batch.sparse, other)
    assert (keys != changed).nonzero().flatten().tolist() == [5]
    assert len(set(keys.tolist())) == 400 > len(set(row_keys(batch.sparse).tolist()))


def test_columns_are_chosen_by_data_features(made):
    schema = Schema.read(made).select(["age", "user"], None)
    assert schema.dense_names == ["age"] and schema.feature_names == ["user"]
    with pytest.raises(UserError, match="age: none of them has ids"):
        Schema.read(made).select(["age"], None)


def test_a_dataset_without_says_nothing_of_them(tmp_path):
    ignored = ["price", "age", "never"]
    schema = write_dense(tmp_path, frame(), dense={}, dense_bins=64, ignore=ignored)
    written = json.loads((tmp_path / "data" / "schema.json").read_text())
    assert "dense" not in written and not {"dense", "dense_bins"} & set(written["preparation"])
    assert next(iter(Reader(tmp_path / "data", schema, "train", 4096, num_lanes=1).batches(0, 0))).dense is None


def test_a_warm_start_on_another_scale_is_refused(made, tmp_path, monkeypatch):
    origin = Origin(Schema.read(made).dataset_id, {"path": str(made)})
    monkeypatch.setattr(warm_rows, "origin_of", lambda folder: origin)
    for name, scale in (("log", "log"), ("standard", "standard")):
        (tmp_path / name).mkdir()
        schema = write_dense(tmp_path / name, frame(seed=3), dense={**SPEC["dense"], "price": scale})
        here = Here(tmp_path / name / "data", schema)
        if scale == "log":  # as it was, if from other rows
            assert row_maps(tmp_path, here) is not None
            continue
        with pytest.raises(UserError, match="dense column 'price' is scaled by standard here and was by log"):
            row_maps(tmp_path, here)


def refusal(tmp_path: Path, log: pd.DataFrame, **changes: object) -> str:
    with pytest.raises(UserError) as refused:
        write_dense(tmp_path, log, **changes)
    return str(refused.value)


def test_bad_columns_are_refused_in_one_line(tmp_path, made):
    log = frame()
    log.loc[7, "age"] = math.inf
    assert "row 8: column 'age' is inf; a number must be finite" in refusal(tmp_path, log)
    assert "column 'age' holds string, not numbers" in refusal(tmp_path, frame().assign(age="old"))
    wide = frame().assign(price=np.where(np.arange(600) % 2, 1e308, -1e308))
    assert "dense column 'price' has numbers from -1e+308 to 1e+308" in refusal(
        tmp_path, wide, dense=["price", "age", "never"]
    )
    with pytest.raises(UserError, match="columns named in two roles: price"):
        make_spec({**SPEC, "numeric": ["price"]}, "test")
    with pytest.raises(UserError, match=r"dense\.price"):
        make_spec({**SPEC, "dense": {"price": "cube"}}, "test")
    encoder = Encoder(Schema.read(made), made)
    for value, words in (("old", "the str 'old', not a number"), (math.inf, "inf; a number must be finite")):
        with pytest.raises(UserError, match=f"row 1: dense column 'price' holds .*{words}"):
            encoder.encode([{"price": 1.0}, {"price": value}])
    with pytest.raises(UserError, match=r"row 1: dense column 'price' holds .*inf"):
        encoder.encode(frame().assign(price=[1.0, *[math.inf] * 599]))
    with pytest.raises(UserError, match="no column 'price'"):
        encoder.encode(frame().drop(columns="price"))
    plain = Schema.read(made).select(["user"], None)
    with pytest.raises(UserError, match="'floats' has no dense columns"):
        build_dense(load_config(None, ["--dense.arch=linear"]), plain)
    with pytest.raises(UserError, match=r"hidden=\[8\] has no effect with arch=linear"):
        load_config(None, ["--dense.arch=linear", "--dense.hidden=[8]"])
