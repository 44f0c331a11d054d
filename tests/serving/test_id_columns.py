"""Columns of ids made in C++, against one value at a time in Python, for every encoding and container."""

import datetime
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.data.features import AdmittedHashing, Drawn, Encoding, Feature, Hashing, LogBuckets, RawHash, Vocabulary
from ssr_rec.kernels.value_ids import TextIds, ValueIndex
from ssr_rec.serving.id_columns import ToIds, index_folder, make_index, make_to_ids, write_columns
from tests.cases import one_quick
from tests.odd_rows import odd_float, odd_text
from tests.value_reference import make_to_id

KNOWN = [*map(str, range(-40, 60, 3)), "true", "", "a", "7.5", "-0", "Ü", "2024-01-01", str(2**63 - 1), "x" * 300, "\0"]
TEXTS = ["7.00", "-.0", "True", "0.0"]


def value_of(draw: random.Random, kind: str) -> Any:
    if draw.random() < 0.1:
        return draw.choice([None, None, math.nan, pd.NA])
    if kind == "mixed":
        kind = draw.choice(["text", "whole", "float", "flag", "small", "day", "numpy", "odd"])
    return {
        "text": lambda: draw.choice([odd_text(draw), draw.choice(KNOWN), *TEXTS, "z" * draw.randrange(130)]),
        "whole": lambda: draw.choice([draw.randrange(-50, 60), draw.randrange(-(2**63), 2**63)]),
        "float": lambda: odd_float(draw),
        "flag": lambda: draw.random() < 0.5,
        "small": lambda: float(draw.randrange(-50, 60)),
        "day": lambda: datetime.date(2024, 1, draw.randrange(1, 5)),
        "numpy": lambda: draw.choice([np.int8(3), np.uint64(2**64 - 1), np.float32(4), np.str_("a"), np.True_, 2**70]),
        "odd": lambda: draw.choice(["\ud800", b"x", 1j, [1], datetime.datetime(2024, 1, 1), 2**130, math.inf]),
    }[kind]()  # fmt: skip


def encodings(folder: Path) -> list[Feature]:
    values = {"value": KNOWN, "id": [2 + 3 * i % 97 for i in range(len(KNOWN))]}
    pq.write_table(pa.table(values), folder / "v.parquet", row_group_size=7)
    made: list[Encoding] = [
        Vocabulary(column="x", min_count=1, file="v.parquet"),
        AdmittedHashing(column="x", num_buckets=9, min_count=2, file="v.parquet", missing_id=5, oov_id=3),
        Hashing(column="x", num_buckets=1_000_003, first_id=4),
        Hashing(column="x", num_buckets=2**40),
        RawHash(column="x"),
        LogBuckets(column="x", low=-3.7, high=9.1, num_buckets=40),
        LogBuckets(column="x", low=2.0, high=2.0, num_buckets=10, first_id=3),
        Drawn(column="x"),
    ]
    return [
        Feature(name=str(i), kind="categorical", num_embeddings=50, encoding=encoding)
        for i, encoding in enumerate(made)
    ]


def containers(values: list[Any]) -> list[Any]:
    """The list itself, and Arrow arrays and pandas columns that hold the same values."""
    found: list[Any] = [values, tuple(values)]
    if {type(value) for value in values} <= {type(None), str, int, bool} or all(
        value is None or type(value) is float for value in values
    ):
        try:
            array = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return found
        found += [array, pa.concat_arrays([array[:3], array])[len(array[:3]) :], array.dictionary_encode()]
        if pa.types.is_string(array.type):
            found += [array.cast(pa.large_string()), array.cast(pa.string_view())]
        if pa.types.is_integer(array.type):
            found += [array.cast(pa.int8())] if all(v is None or abs(v) < 100 for v in values) else []
    return found


@pytest.mark.parametrize("is_canonical", one_quick(False, True))
def test_columns_have_the_ids_of_single_values(tmp_path, is_canonical):
    features = encodings(tmp_path)
    encoders = make_to_ids(features, tmp_path, is_canonical)
    draw = random.Random(3)
    equal = refused = 0
    for number in range(150):
        kind = ["text", "whole", "float", "flag", "small", "mixed"][number % 6]
        values = [value_of(draw, kind) for _ in range(draw.choice([0, 1, 5, 70]))]
        if draw.random() < 0.7:
            values = [None if value is pd.NA or value != value else value for value in values]
        for feature, encoder in zip(features, encoders, strict=True):
            to_id = make_to_id(feature, tmp_path, is_canonical)
            for held in containers(values):
                out = np.full(len(values), -7)
                wanted, problem = [], None
                for row, value in enumerate(values):
                    try:
                        wanted.append(to_id(value))
                    except ValueError as error:
                        problem = f"row {row} {error}"
                        break
                if problem is None:
                    write_columns([encoder], [held], [out])
                    assert out.tolist() == wanted, (feature.encoding, kind, values)
                    equal += 1
                else:
                    with pytest.raises(ValueError) as caught:
                        write_columns([encoder], [held], [out])
                    assert str(caught.value) == problem
                    refused += 1
    assert equal > 1_500 and refused > 200


def test_every_length_of_text_has_the_digest_of_hashlib(tmp_path):
    (feature,) = [f for f in encodings(tmp_path) if isinstance(f.encoding, RawHash)]
    texts = ["é" * (n // 2) + "a" * (n % 2) for n in range(1, 200)]
    out = np.empty(len(texts), np.int64)
    write_columns(make_to_ids([feature], tmp_path), [pa.array(texts)], [out])
    assert out.tolist() == [make_to_id(feature, tmp_path)(text) for text in texts]


def test_a_large_vocabulary_is_found_whole(tmp_path):
    values = [f"user-{i * 7919}" for i in range(50_000)]
    pq.write_table(pa.table({"value": values, "id": range(2, 50_002)}), tmp_path / "v.parquet")
    feature = Feature(
        name="u",
        kind="categorical",
        num_embeddings=60_000,
        encoding=Vocabulary(column="u", min_count=1, file="v.parquet"),
    )
    out = np.empty(100_000, np.int64)
    unknown = [f"user-{i * 7919 + 1}" for i in range(50_000)]
    for mapped in (False, True):
        if mapped:
            shutil.rmtree(index_folder(tmp_path / "v.parquet"))
        made = make_index(tmp_path / "v.parquet") if mapped else ValueIndex(pa.array(["other"]), np.array([9]))
        made.write(index_folder(tmp_path / "v.parquet"))
        # An index without a checksum beside the vocabulary is not looked at.
        (to_ids,) = make_to_ids([feature], tmp_path, files=["v.parquet", *["v.index/slots.npy"] * mapped])
        assert to_ids.to is not None and isinstance(to_ids.to.index.slots, np.memmap) == mapped
        write_columns([to_ids], [values + unknown], [out])
        assert out[:50_000].tolist() == list(range(2, 50_002)) and (out[50_000:] == 1).all()


def test_a_mapped_index_may_be_empty_and_one_that_does_not_fit_is_refused(tmp_path):
    ValueIndex(pa.array([], pa.string()), np.empty(0, np.int64)).write(tmp_path / "empty")
    out = np.empty(1, np.int64)
    to = ToIds(TextIds("vocabulary", 0, 1, True, ValueIndex.read(tmp_path / "empty")), str)
    write_columns([to], [["a"]], [out])
    assert out.tolist() == [1]
    ValueIndex(pa.array(["a", "b"]), np.array([4, 5])).write(tmp_path / "two")
    slots = np.load(tmp_path / "two" / "slots.npy")
    np.save(tmp_path / "two" / "slots.npy", np.roll(slots, 1))
    with pytest.raises(ValueError, match="two: an index of another version; export the run again"):
        ValueIndex.read(tmp_path / "two")
    (tmp_path / "two" / "ids.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="not an index of values"):
        ValueIndex.read(tmp_path / "two")


@pytest.mark.parametrize("name", ["slots", "offsets"])
def test_a_damaged_index_gives_ids_that_no_scorer_takes_and_reads_nothing_beyond_itself(tmp_path, name):
    texts = [f"v{i}" for i in range(1000)]
    ValueIndex(pa.array(texts), np.arange(2, 1002)).write(tmp_path / "index")
    good = np.load(tmp_path / "index" / f"{name}.npy")
    out, found = np.empty(1000, np.int64), set()
    looks = [lambda one: one | np.uint64(2**32 - 1), lambda one: one & ~np.uint64(2**32 - 1) | np.uint64(2**31)]
    looks = [*looks, lambda one: np.maximum(one, np.uint64(5))] if name == "slots" else [lambda one: one * 2**40]
    for damage in looks:
        bad = good.copy()
        if name == "slots":
            some = bad != 0 if damage is not looks[2] else slice(None)
            bad[some] = damage(bad[some])
        else:
            bad[1:-1] = damage(bad[1:-1])
        index = ValueIndex(pa.array(texts), np.arange(2, 1002))
        setattr(index, name, bad)
        write_columns([ToIds(TextIds("vocabulary", 0, 1, True, index), str)], [texts], [out])
        found |= set(out.tolist()) - set(range(2, 1002))
        write_columns([ToIds(TextIds("vocabulary", 0, 1, True, index), str)], [["unknown"] * 1000], [out])
        assert set(out.tolist()) <= {1, -1}
    assert found == {-1}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets", lambda a: a[:-1], "2 offsets for 2 values"),
        ("offsets", lambda a: a + 1, "3 offsets for 2 values of 2 bytes"),
        ("ids", lambda a: a.astype(np.int32), "ids is int32"),
        ("ids", lambda a: np.append(a, a), "slots for 4 values"),
        ("slots", lambda a: a[:-1], "slots for 2 values"),
        ("text", lambda a: a.view(np.int8), "text is int8"),
    ],
)
def test_arrays_that_are_not_of_one_index_are_refused(tmp_path, name, change, message):
    ValueIndex(pa.array(["a", "b"]), np.array([4, 5])).write(tmp_path / "two")
    path = tmp_path / "two" / f"{name}.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match=f"two: not an index of values: .*{message}"):
        ValueIndex.read(tmp_path / "two")
