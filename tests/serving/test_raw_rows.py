"""Raw rows to ids: equal to the preparation's by DuckDB on odd values, and never anything but ids or a ValueError."""

import datetime
import decimal
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.schema import Schema
from ssr_rec.serving.raw_rows import Encoder
from tests.odd_rows import SPEC, odd_float, odd_rows, odd_text, prepared


def assert_equal(schema: Schema, encoder: Encoder, raw: Any, wanted: list[dict[str, Any]]) -> None:
    found = encoder.encode(raw)
    singles = iter(found.ids)
    lists = iter(found.lists)
    for feature in schema.features:
        mine: list[Any]
        if feature.kind == "list":
            ids, offsets = next(lists)
            mine = [ids[a:b].tolist() for a, b in pairwise(offsets)]
        else:
            mine = next(singles).tolist()
        theirs = [row[feature.name] for row in wanted]
        assert len(mine) == len(theirs)
        wrong = [row for row in range(len(mine)) if mine[row] != theirs[row]]
        assert not wrong, (feature.name, wrong[0], mine[wrong[0]], theirs[wrong[0]])


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_odd_values_get_the_ids_of_the_preparation(tmp_path, count):
    rows = odd_rows(count, seed=count)
    table = pa.Table.from_pylist(rows)
    schema, folder, wanted = prepared(tmp_path, table)
    encoder = Encoder(schema, folder)
    assert_equal(schema, encoder, table, wanted)
    assert_equal(schema, encoder, table.to_batches()[0], wanted)
    assert_equal(schema, encoder, rows, wanted)
    assert_equal(schema, encoder, table.slice(1000, 500), wanted[1000:1500])
    assert_equal(schema, encoder, folder.parent / "raw.parquet", wanted)
    # pandas makes integers with gaps floats: exact as long as a float can say them.
    safe = [row for row, values in enumerate(rows) if all(abs(values[n] or 0) < 2**53 for n in ("number", "count"))]
    frame = table.take(safe).to_pandas()
    assert frame["number"].dtype == np.float64 and frame["flag"].dtype == object
    assert_equal(schema, encoder, frame, [wanted[row] for row in safe])
    for name in schema.feature_names:
        ids = [row[name] for row in wanted]
        assert len({tuple(i) if isinstance(i, list) else i for i in ids}) > 2, "the values must differ"


def test_buckets_change_at_the_same_floats(tmp_path):
    """Every float beside the edge of a bucket, where another rounding of the logarithm would show."""
    rows = [{"click": i % 2, "price": value, "small": 1} for i, value in enumerate([-50.0, 1e4] * 500)]
    low, high = -math.log(51.0), math.log(10001.0)
    for edge in range(41):
        t = low + edge * (high - low) / 40
        near = math.copysign(math.exp(abs(t)) - 1, t)
        for step in range(-12, 13):
            value = near
            for _ in range(abs(step)):
                value = math.nextafter(value, math.copysign(math.inf, step))
            rows.append({"click": 0, "price": min(max(value, -50.0), 1e4), "small": 2})
    table = pa.Table.from_pylist(rows)
    roles = {"categorical": ["small"], "numeric": ["price"], "lists": {}, "hash_buckets": {}}
    schema, folder, wanted = prepared(tmp_path, table, **roles)
    assert_equal(schema, Encoder(schema, folder), table, wanted)
    assert len({row["price"] for row in wanted}) == 40


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("odd")
    schema, prepared_folder, _ = prepared(folder, pa.Table.from_pylist(odd_rows(2_000, seed=1)))
    return Encoder(schema, prepared_folder)


DATE = datetime.date(2024, 1, 1)
NONE: dict[str, Any] = {}


def one(encoder: Encoder, **values: Any) -> dict[str, Any]:
    found = encoder.encode([values])
    singles = [f.name for f in encoder.features if f.kind != "list"]
    lists = [f.name for f in encoder.features if f.kind == "list"]
    ids = dict(zip(singles, found.ids[:, 0].tolist(), strict=True))
    return {**ids, **{name: part[0].tolist() for name, part in zip(lists, found.lists, strict=True)}}


def test_documented_defaults(odd):
    nothing = dict.fromkeys(SPEC["categorical"] + SPEC["numeric"], 0) | {name: [] for name in SPEC["lists"]}
    assert one(odd) == one(odd, **dict.fromkeys(nothing)) == nothing
    assert one(odd, **dict.fromkeys(nothing, math.nan)) == one(odd, **dict.fromkeys(nothing, pd.NA)) == nothing
    assert one(odd, whatever=object(), click="x") == nothing
    seen = one(odd, number=7)["number"]
    assert seen > 1
    for same in (7.0, "7", np.int32(7), np.float32(7), np.str_("7")):
        assert one(odd, number=same)["number"] == seen
    assert one(odd, number=-1)["number"] > 1, "a negative number is a value like others"
    assert one(odd, number=10**30)["number"] == one(odd, number="-99999")["number"] == 1
    assert one(odd, text="x" * 2**20)["text"] == 1 and one(odd, hashed="x" * 2**20)["hashed"] > 0
    assert one(odd, flag=True)["flag"] == one(odd, flag="true")["flag"] == one(odd, flag=np.True_)["flag"] > 1
    assert one(odd, flag=1)["flag"] == 1, "1 is not true"
    assert [one(odd, price=value)["price"] for value in (1.7e308, -1e308, -1e300)] == [40, 1, 1]
    assert one(odd, price=True)["price"] == one(odd, price=1)["price"] == one(odd, price=np.float16(1))["price"]
    assert one(odd, codes=[None, math.nan])["codes"] == [0, 0] and len(one(odd, codes=tuple(range(99)))["codes"]) == 4
    assert one(odd, codes=np.arange(3))["codes"] == one(odd, codes=["0", 1.0, 2])["codes"]
    assert len(one(odd, words="x||y||z")["words"]) == 2 and one(odd, words=["x", "y"]) == one(odd, words="x||y")
    empty = odd.encode([])
    assert empty.ids.shape == (8, 0) and all(len(ids) == 0 and offsets.tolist() == [0] for ids, offsets in empty.lists)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": 1.5}, "row 0: feature 'number' holds the float 1.5; a category is"),
        ({"number": math.inf}, "feature 'number' holds the float inf"),
        ({"number": 1e300}, "feature 'number' holds the float 1e"),
        ({"number": 10**5000}, "feature 'number' holds an integer beyond 128 bits"),
        ({"number": b"7"}, "feature 'number' holds the bytes b'7'"),
        ({"number": [7]}, "feature 'number' holds a list"),
        ({"number": {}}, "feature 'number' holds a dict"),
        ({"day": datetime.datetime(2024, 1, 1)}, "feature 'day' holds a datetime"),
        ({"text": decimal.Decimal(7)}, "feature 'text' holds a Decimal"),
        ({"hashed": "\ud800"}, "feature 'hashed' holds half of a surrogate"),
        ({"price": "12"}, "feature 'price' holds the str '12', not a number"),
        ({"price": -math.inf}, "feature 'price' holds the float -inf; a number must be finite"),
        ({"price": 10**5000}, "feature 'price' holds an integer beyond 128 bits; a number must be finite"),
        ({"price": 1j}, "feature 'price' holds a complex"),
        ({"price": "x" * 2**20}, r"feature 'price' holds the str 'x{40}'\.\.\., not a number"),
        ({"codes": 7}, "feature 'codes' holds the int 7, not a list"),
        ({"codes": "7"}, "feature 'codes' holds the str '7', not a list"),
        ({"words": 7}, r"feature 'words' holds the int 7, not a list, or text with '\|\|' between"),
        ({"codes": [[7]]}, "feature 'codes' holds a list; .* in its list"),
        ({"codes": np.zeros((2, 2))}, "feature 'codes' holds a ndarray, not a list"),
    ],
)
@pytest.mark.filterwarnings("ignore::pandas.errors.PerformanceWarning")
def test_wrong_types_are_refused_by_row_and_name(odd, values, message):
    with pytest.raises(ValueError, match=message):
        one(odd, **values)
    with pytest.raises(ValueError, match=message.replace("row 0", "row 2")):
        odd.encode([NONE, NONE, values, values])
    with pytest.raises(ValueError, match=r"row 12: feature"):
        odd.encode([NONE, NONE, values], first_row=10)
    frame = pd.DataFrame({name: pd.Series([None, None], dtype=object) for name in odd.columns})
    for name, value in values.items():
        frame.at[1, name] = value
    with pytest.raises(ValueError, match=rf"feature '{next(iter(values))}' "):
        odd.encode(frame)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (7, "rows are a int"),
        ({"number": 7}, "rows are a dict"),
        ([NONE, 7], "row 1 is a int, not a mapping"),
        (["number"], "row 0 is a str"),
        (pd.DataFrame({"nunber": [1]}), "no column 'number', 'text'.*; a table needs"),
        (pa.table({"click": [1]}), "no column 'number'"),
        ("nowhere.parquet", "nowhere.parquet: cannot be read"),
        (Path(__file__), "cannot be read as parquet"),
    ],
)
def test_what_are_no_rows_is_refused(odd, rows, message):
    with pytest.raises(ValueError, match=message):
        odd.encode(rows)


def test_tables_must_have_every_column_once(odd):
    table = pa.Table.from_pylist(odd_rows(3, seed=2))
    with pytest.raises(ValueError, match="no column 'price'"):
        odd.encode(table.drop(["price"]))
    renamed = table.rename_columns(["Price" if name == "price" else name for name in table.column_names])
    with pytest.raises(ValueError, match="no column 'price', did you mean 'Price'"):
        odd.encode(renamed.to_pandas())
    twice = table.append_column("price", table["price"])
    with pytest.raises(ValueError, match="column 'price' is there 2 times"):
        odd.encode(twice)
    frame = pd.concat([table.to_pandas(), table.to_pandas()[["price"]]], axis=1)
    with pytest.raises(ValueError, match="column 'price' is there 2 times"):
        odd.encode(frame)
    odd.encode(table.append_column("click2", table["click"]).append_column("click2", table["click"]))


def test_tables_without_rows(odd, tmp_path):
    table = pa.Table.from_pylist(odd_rows(3, seed=2)).slice(0, 0)
    pq.write_table(table, tmp_path / "none.parquet")
    for rows in (table, table.to_pandas(), tmp_path / "none.parquet", pd.DataFrame(columns=odd.columns)):
        found = odd.encode(rows)
        assert found.ids.shape == (8, 0) and [offsets.tolist() for _, offsets in found.lists] == [[0]] * 3


@pytest.mark.parametrize(
    ("kind", "column", "fine"),
    [
        (pa.timestamp("us"), "day", False),
        (pa.decimal128(5, 2), "price", False),
        (pa.binary(), "text", False),
        (pa.list_(pa.string()), "text", False),
        (pa.string(), "price", False),
        (pa.large_list(pa.int16()), "codes", True),
        (pa.list_(pa.int8(), 2), "codes", True),
        (pa.dictionary(pa.int32(), pa.string()), "text", True),
        (pa.large_string(), "hashed", True),
        (pa.string_view(), "text", True),
        (pa.null(), "codes", True),
        (pa.null(), "price", True),
        (pa.uint64(), "number", True),
        (pa.float16(), "price", True),
        (pa.string(), "words", True),
        (pa.string(), "codes", False),
    ],
)
def test_arrow_types(odd, kind, column, fine):
    sample = {"codes": [1, 2], "price": 3, "day": DATE, "words": "a||b"}.get(column, "1")
    sample = 1 if pa.types.is_integer(kind) else sample
    if pa.types.is_decimal(kind):
        sample = decimal.Decimal("1.50")
    if pa.types.is_float16(kind):
        sample = np.float16(3)
    if column == "text" and pa.types.is_list(kind):
        sample = ["1"]
    if pa.types.is_binary(kind):
        sample = b"1"
    if pa.types.is_string(kind) and column != "words":
        sample = "1"
    if pa.types.is_timestamp(kind):
        sample = datetime.datetime(2024, 1, 1)
    values = [None, None] if pa.types.is_null(kind) else [None, sample]
    table = pa.Table.from_pylist(odd_rows(2, seed=3))
    table = table.set_column(table.column_names.index(column), column, pa.array(values, kind))
    if not fine:
        with pytest.raises(ValueError, match=f"feature '{column}' holds"):
            odd.encode(table)
        return
    found, plain = odd.encode(table), odd.encode(table.to_pylist())
    assert (found.ids == plain.ids).all()
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(found.lists, plain.lists, strict=True))


def random_value(draw: random.Random, depth: int = 0) -> Any:
    makers = [
        lambda: None,
        lambda: draw.choice([math.nan, math.inf, -math.inf, pd.NA, pd.NaT, np.nan]),
        lambda: draw.randrange(-(10 ** draw.randrange(1, 60)), 10 ** draw.randrange(1, 60)),
        lambda: odd_float(draw),
        lambda: odd_text(draw),
        lambda: draw.choice([True, False, np.True_, b"x", object(), DATE, pd.Timestamp(0), decimal.Decimal(1), 1j, {}]),
        lambda: np.array([draw.random() for _ in range(3)]).astype(draw.choice(["i1", "u8", "f2", "f8", "U5"])),
        lambda: draw.choice([np.int8, np.uint64, np.float32])(draw.randrange(100)),
        lambda: "\ud800" * draw.randrange(3),
    ]
    if depth < 2:
        makers += [lambda: [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]] * 3
    return draw.choice(makers)()


def test_random_rows_give_ids_or_a_value_error(odd):
    draw = random.Random(5)
    sizes = [feature.num_embeddings for feature in odd.features if feature.kind != "list"]
    refused = 0
    for number in range(1_500):
        names = draw.sample(odd.columns, draw.randrange(1, 3))
        rows: Any = [{name: random_value(draw) for name in names} for _ in range(draw.randrange(3))]
        if number % 5 == 0:
            rows = pd.DataFrame(rows, columns=odd.columns, dtype=object)
        try:
            found = odd.encode(rows)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 500
            continue
        assert found.ids.shape == (8, len(rows))
        assert (found.ids >= 0).all() and (found.ids < np.array(sizes)[:, None]).all()
    assert 300 < refused < 1_400
