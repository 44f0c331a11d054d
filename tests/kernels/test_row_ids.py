"""Whole rows turned into ids in C++, against one value at a time in Python; what is not read here is left to others."""

import json
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ssr_rec.kernels import row_ids as module
from ssr_rec.kernels.row_ids import FieldOfRow, RowIds
from ssr_rec.serving.id_columns import make_to_ids
from tests.cases import slow
from tests.serving.test_id_columns import encodings, value_of
from tests.value_reference import make_to_id

COMMON = (type(None), str, int, float, bool)


def wanted_of(to_id: Any, values: list[Any]) -> list[int] | None:
    """The ids; None where a value has none."""
    try:
        return [to_id(value) for value in values]
    except ValueError:
        return None


def batches_of(values: list[Any], rows: int) -> list[pa.RecordBatch]:
    """The same column in every type that holds it, among others, whole and cut out of a larger one."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return []
    kinds = {type(item) for value in values for item in (value if isinstance(value, list) else [value])}
    if len(kinds - {type(None)}) > 1:
        return []  # Arrow would make one type of several
    found = [array]
    item = array.type.value_type if pa.types.is_list(array.type) else array.type
    other = {
        "string": [pa.large_string()],
        "int64": [pa.int8(), pa.uint16(), pa.int32()],
        "double": [pa.float32()],
    }
    for kind in other.get(str(item), []):
        wider = pa.large_list(kind) if pa.types.is_list(array.type) else kind
        try:
            cast = array.cast(wider)
        except pa.ArrowInvalid:
            continue
        found += [cast] if cast.to_pylist() == array.to_pylist() else []
    made = []
    for one in found:
        longer = pa.concat_arrays([one[:1], one, one[:1]])
        made += [
            pa.record_batch({"y": pa.nulls(rows), "x": one}),
            pa.record_batch({"x": longer})[len(one[:1]) :][:rows],
        ]
    return made


@pytest.mark.parametrize(
    ("is_canonical", "listed"),
    [
        (True, False),
        (False, True),
        slow((True, True)),
        slow((False, False)),
    ],
)
def test_rows_have_the_ids_of_single_values(tmp_path: Path, is_canonical: bool, listed: bool) -> None:
    features = encodings(tmp_path)
    draw = random.Random(5)
    equal, left = 0, 0
    for number in range(120):
        kind = ["text", "whole", "float", "flag", "small", "mixed"][number % 6]
        rows = draw.choice([1, 5, 70])
        column: list[Any] = [value_of(draw, kind) for _ in range(rows)]
        if number % 6 < 5 and draw.random() < 0.7:
            column = [None if not isinstance(v, COMMON) or v != v else v for v in column]
        if listed:
            column = [draw.choices(column, k=draw.randrange(5)) if draw.random() < 0.9 else None for _ in column]
        most, last = draw.choice([1, 3, 9]), draw.random() < 0.5
        for feature, to in zip(features, make_to_ids(features, tmp_path, is_canonical), strict=True):
            to_id = make_to_id(feature, tmp_path, is_canonical)
            items = [v or [] for v in column] if listed else [[v] for v in column]
            kept = [one[-most:] if last else one[:most] for one in items] if listed else items
            wanted = [wanted_of(to_id, one) for one in kept]
            row_ids = RowIds([FieldOfRow("x", to.to, feature.num_embeddings, most if listed else None, last)])
            dicts = [{"a": 1, "x": v} if v is not None else {} for v in column]
            batches = batches_of(column, rows)
            for held in (dicts, *batches):
                found = row_ids.of_dicts(held) if held is dicts else row_ids.of_batch(held)
                if found is None:
                    left += 1
                    simple = all(type(v) in (type(None), str, bool) for one in kept for v in one)
                    drawn = to.to is None
                    assert None in wanted or drawn or not simple or held is not dicts, (feature.encoding, column)
                    continue
                if listed:
                    assert found.lengths.tolist() == [[len(one) for one in items]]
                    ids, offsets = found.lists[0]
                    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == wanted
                else:
                    assert found.singles.tolist() == [[one[0] for one in wanted if one]], (feature.encoding, column)
                equal += 1
    assert equal > 1_000 and left > 100, (equal, left)


def test_what_is_not_common_is_left_to_others(tmp_path: Path) -> None:
    features = encodings(tmp_path)
    (to, *_) = make_to_ids(features, tmp_path, True)
    one = RowIds([FieldOfRow("x", to.to, 50, None)])
    listed = RowIds([FieldOfRow("x", to.to, 50, 3)])

    class Row(dict[str, Any]):
        pass

    for rows in ([Row(x=1)], [{"x": 1}, 7], [{"x": np.int64(1)}], [{"x": [1]}], [{"x": "\ud800"}], [{"x": 2**64}]):
        assert one.of_dicts(rows) is None
    for value in (7, "a", np.array([1]), [[1]], {1}):
        assert listed.of_dicts([{"x": value}]) is None
    for array in (pa.array([[1]]), pa.array([b"a"]), pa.array(["a"]).dictionary_encode(), pa.array([1], pa.uint64())):
        assert one.of_batch(pa.record_batch({"x": array})) is None
    for array in (pa.array(["a"]), pa.array([[[1]]]), pa.array([[1]], pa.list_(pa.int64(), 1))):
        assert listed.of_batch(pa.record_batch({"x": array})) is None
    assert listed.of_dicts([{"x": (7, None)}]).lists[0][1].tolist() == [0, 2]  # type: ignore[union-attr]


def test_keys_may_stand_in_any_order_and_be_other_objects(tmp_path: Path) -> None:
    """Rows like the first one are walked through; all others are asked key by key."""
    (to, *_) = make_to_ids(encodings(tmp_path), tmp_path, True)
    names = ["x", "y", "x", "z"]  # two features of one column
    row_ids = RowIds([FieldOfRow(name, to.to, 50, None) for name in names])
    draw = random.Random(1)
    like_the_first: list[Any] = json.loads(json.dumps([{"y": k, "no": [k], "x": -k, "z": str(k)} for k in range(30)]))
    for rows in (
        like_the_first,
        [dict(draw.sample(sorted(row.items(), key=str), draw.randrange(5))) for row in like_the_first],
        [{}, *like_the_first],
        [{7: 1, None: 2, "x": 3, ("y",): 4}, *like_the_first],
        [*like_the_first, {**like_the_first[0], "more": 1}],
    ):
        found = row_ids.of_dicts(rows)
        assert found is not None
        for name, ids in zip(names, found.singles, strict=True):
            alone = RowIds([FieldOfRow("v", to.to, 50, None)]).of_dicts([{"v": row.get(name)} for row in rows])
            assert alone is not None and ids.tolist() == alone.singles[0].tolist()


def test_a_batch_is_read_by_its_own_names_while_another_thread_reads_one_of_another_order() -> None:
    row_ids = RowIds([FieldOfRow("x", None, 50, None), FieldOfRow("y", None, 50, None)])
    batch, turned = pa.record_batch({"x": [1], "y": [2]}), pa.record_batch({"y": [2], "x": [1]})

    def export(*addresses: int) -> None:
        assert row_ids.of_batch(turned) is not None  # the other thread
        batch._export_to_c(*addresses)

    found = row_ids.of_batch(SimpleNamespace(schema=batch.schema, num_rows=1, _export_to_c=export))
    assert found is not None and found.singles.tolist() == [[1], [2]]


@pytest.mark.parametrize("change", ["item", "row", "no list"])
def test_rows_that_another_thread_changes_are_read_as_they_were_or_not_here(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    row_ids = RowIds([FieldOfRow("x", None, 50, 9), FieldOfRow("y", None, 50, None)])
    rows: list[Any] = [{"x": [1, 2], "y": 3}, {"x": [], "y": 4}]
    real = module._python()

    def lengths(*arguments: Any) -> Any:
        found = real.ssr_rec_lengths_of_dicts(*arguments)
        if change == "item":
            rows[1]["x"] += [7] * 7
        elif change == "row":
            rows.extend({"x": [7], "y": 7} for _ in range(1000))
        else:
            rows[0]["x"] = "ab"
        return found

    changed = SimpleNamespace(ssr_rec_lengths_of_dicts=lengths, ssr_rec_ids_of_dicts=real.ssr_rec_ids_of_dicts)
    monkeypatch.setattr(module, "_python", lambda: changed)
    found = row_ids.of_dicts(rows)
    if change == "row":
        assert found is not None and found.lists[0][0].tolist() == [1, 2] and found.singles.tolist() == [[3, 4]]
    else:
        assert found is None
