"""Draws a random log: a spec and rows whose columns are of random kinds, with the parts that docs/data.md lists."""

from __future__ import annotations

import datetime
import math
import random
from typing import Any

import numpy as np
import pyarrow as pa

from tests.fuzz.log_reference import Row, text_of

WORDS = [
    "",
    "a",
    "b c",
    " a",
    "007",
    "7",
    "7.0",
    "True",
    "FALSE",
    "none",
    "NaN",
    "null",
    'a "q"',
    "x\ny",
    "Ü",
    "日本",
    ",",
]
WORDS += ["\t", "'", "-3.00", "1e5", "-", "0", "false", "a,b", "é", "\\", "=1"]
ITEMS = ["a", "7", "7.0", "True", "true", "", "Ü", "b c", "007"]


def draw(seed: int) -> tuple[dict[str, Any], list[Row], dict[str, pa.DataType], list[int]]:
    """Return a spec, rows, the parquet type of each column, and how many rows each file has."""
    r = random.Random(seed)
    count = r.randrange(60, 200)
    gaps = r.choice([0.0, 0.2])

    def missing(value: Any) -> Any:
        return None if r.random() < gaps else value

    def unknown(value: Any) -> Any:
        return missing(math.nan if r.random() < gaps else value)

    day = datetime.date(2024, 1, 1)
    kinds: dict[str, tuple[pa.DataType, Any]] = {
        "small": (pa.int64(), lambda: missing(r.randrange(-3, 9))),
        "large": (pa.int64(), lambda: r.choice([2**53 + 1, -(2**60), 2**62, 5])),
        "unsigned": (pa.uint64(), lambda: r.choice([0, 7, 2**63 + 5, 2**64 - 1])),
        "flag": (pa.bool_(), lambda: missing(r.random() < 0.5)),
        "word": (pa.string(), lambda: missing(r.choice(WORDS))),
        "date": (pa.date32(), lambda: missing(day + datetime.timedelta(r.randrange(5)))),
        "narrow": (pa.int16(), lambda: r.randrange(0, 30)),
    }
    columns: dict[str, tuple[pa.DataType, Any]] = {}
    for number in range(r.randrange(1, 5)):
        kind = r.choice(list(kinds))
        columns[f"c{number}_{kind}"] = kinds[kind]
    categorical = list(columns)
    numeric = [f"n{number}" for number in range(r.randrange(0, 3))]
    for name in numeric:
        integers, scale = r.random() < 0.3, 10 ** r.randrange(0, 6)
        constant = r.random() < 0.1
        columns[name] = (
            (pa.int64(), lambda s=scale: missing(r.randrange(-s, s + 1)))
            if integers
            else (pa.float64(), lambda s=scale, c=constant: unknown(1.5 if c else r.gauss(0, s)))
        )
    lists: dict[str, Any] = {}
    for number in range(r.randrange(0, 3)):
        whole, name = r.random() < 0.4, f"l{number}"
        lists[name] = {"max_length": r.randrange(1, 5), "separator": "|", "keep": r.choice(["first", "last"])}

        def items(whole: bool = whole) -> Any:
            if r.random() < 0.2:
                return r.choice([None, []])
            found = [r.randrange(9) if whole else r.choice(ITEMS) for _ in range(r.randrange(1, 6))]
            return found if found != [""] else ["a"]  # as text, that is an empty list

        columns[name] = (pa.list_(pa.int64() if whole else pa.string()), items)
    group = r.choice(["whole", "word"])
    columns["g"] = (pa.int64(), lambda: r.randrange(9)) if group == "whole" else (pa.string(), lambda: r.choice("abc7"))
    columns["x"] = (pa.float64(), lambda: unknown(r.gauss(0, 1)))
    columns["t"] = (pa.int64(), lambda: r.choice([1, 2, 10, 99, 10**18 + r.randrange(9)]))
    columns["click"] = (pa.int64(), lambda: int(r.random() < 0.4))
    rows = [{name: make() for name, (_, make) in columns.items()} for _ in range(count)]
    hashed = {name: r.randrange(2, 40) for name in (*categorical, *lists) if r.random() < 0.25}
    split: dict[str, Any] = {"type": "random", "ratios": [6, 2, 2]}
    if r.random() < 0.4:
        split = {"type": "time", "column": "t", "boundaries": [10, 10**17]}
    spec = {
        "name": "log",
        "labels": ["click"],
        "categorical": categorical,
        "numeric": numeric,
        "lists": lists,
        "group_id": "g",
        "split": split,
        "min_count": r.randrange(1, 4),
        "num_buckets": r.randrange(1, 20),
        "hash_buckets": hashed,
        "ignore": ["x"] if split["type"] == "time" else ["x", "t"],
        "dense_bins": r.randrange(1, 9),
    }
    cuts = sorted(r.randrange(0, count) for _ in range(r.randrange(0, 3)))
    sizes = np.diff([0, *cuts, count]).tolist()
    found = {name: kind for name, (kind, _) in columns.items()}
    found |= draw_sequences(r, spec, rows)
    found |= draw_numbers(r, spec, rows)
    found |= draw_weighted_list(r, spec, rows)
    found |= draw_number_label(r, spec, rows)
    found |= draw_groups(r, spec, rows)
    draw_negatives(r, spec)
    return spec, rows, found, [size for size in sizes if size]


def draw_sequences(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log a sequence of lists, a vocabulary shared with a column, a history of its own, or none of these."""
    kinds: dict[str, pa.DataType] = {}
    sequences: dict[str, Any] = {}
    if r.random() < 0.4:
        sequences["given"] = {"columns": ["s0", "s1"], "numeric": ["sn"], "max_length": r.randrange(1, 5)}
        sequences["given"]["separator"] = "|"
        if r.random() < 0.5:
            sequences["given"]["age"] = sequences["given"]["numeric"].pop()
        kinds |= {"s0": pa.list_(pa.int64()), "s1": pa.list_(pa.string()), "sn": pa.list_(pa.float64())}
        for row in rows:
            length = r.randrange(0, 6)
            row["s0"] = [r.randrange(9) for _ in range(length)]
            row["s1"] = [r.choice(ITEMS[:5]) for _ in range(length)]
            row["sn"] = [round(abs(r.gauss(0, 50)), 2) for _ in range(length)]
        if r.random() < 0.6:
            kinds["sc"] = pa.int64()
            spec["categorical"] = [*spec["categorical"], "sc"]
            spec["vocabularies"] = {"shared": ["s0", "sc"]}
            for row in rows:
                row["sc"] = r.randrange(3, 12)
    if r.random() < 0.4:
        named = [*spec["categorical"], *spec["numeric"]]
        columns = r.sample(named, min(len(named), r.randrange(1, 3)))
        where = {"where": r.choice(["click = 1", "click = 1 and x > 0", "x != 0"])} if r.random() < 0.5 else {}
        from_log = {"by": "g", "order": "t", "columns": columns, "age": r.random() < 0.5, **where}
        sequences["made"] = {"from_log": from_log, "max_length": r.randrange(1, 5)}
        moments = r.randrange(2, 60)
        for row in rows if spec["split"]["type"] == "random" else ():
            row["t"] = r.randrange(moments)
    if sequences:
        spec["sequences"] = sequences
    return kinds


def draw_numbers(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log row weights, a task of some rows, dense columns and given vectors, or none of these."""
    kinds: dict[str, pa.DataType] = {}

    def column(name: str, kind: pa.DataType, make: Any) -> None:
        kinds[name] = kind
        for row in rows:
            row[name] = make()

    if r.random() < 0.4:
        spec["weight"] = "w"
        column("w", pa.float64(), lambda: r.choice([0.0, 1.0, 1.0, 0.1, 2.25, 1e-3, 1e-50]))
    if r.random() < 0.5:
        spec["labels"] = ["click", "pay"]
        conditions = ["click = 1", "x > 0", "x != 0 and click = 0", *(f"{name} > 0" for name in spec["numeric"])]
        task = {"missing": True} if r.random() < 0.6 else {"where": r.choice(conditions)}
        spec["tasks"] = {"pay": task | ({"where": r.choice(conditions)} if r.random() < 0.3 else {})}
        gap = r.choice([[None], [None, math.nan]])
        kind = pa.float64() if len(gap) > 1 else pa.int64()
        column("pay", kind, lambda: r.choice([0, 1, r.choice(gap)]) if "missing" in task else r.randrange(2))
    if r.random() < 0.5:
        spec["dense"] = {name: r.choice(["standard", "log"]) for name in ("d0", "d1")[: r.randrange(1, 3)]}
        for name in spec["dense"]:
            scale, gaps = 10.0 ** r.randrange(-3, 7), r.choice([0.0, 0.3, 1.0])
            same = r.choice([None, None, None, r.gauss(0, scale)])
            gap = r.choice([None, math.nan])
            column(
                name,
                pa.float64(),
                lambda s=scale, g=gaps, c=same, m=gap: m if r.random() < g else r.gauss(0, s) if c is None else c,
            )
    sources = [name for name in spec["categorical"] if not name.endswith(("word", "unsigned"))]
    if sources and r.random() < 0.5:
        of = r.choice(sources)
        texts = sorted({text for row in rows if (text := text_of(row[of])) is not None})
        values = r.sample(texts, r.randrange(1, len(texts) + 1)) if texts else []
        if values:
            spec["vectors"] = {"v": {"of": of, "file": "", "without": "zero", "values": values}}
    if r.random() < 0.3:
        size = r.randrange(1, 4)
        spec["row_vectors"] = {"rv": size}
        one = lambda: [r.gauss(0, 1) for _ in range(size)]  # noqa: E731
        column("rv", pa.list_(pa.float64()), lambda: one() if r.random() < 0.8 else r.choice([None, []]))
    return kinds


def draw_weighted_list(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log a list whose items have weights, in a column of their own or in the items, or none."""
    if r.random() < 0.5:
        return {}
    in_items = r.random() < 0.5
    settings = {"max_length": r.randrange(1, 5), "separator": "|", "keep": r.choice(["first", "last"])}
    spec["lists"] = {**spec["lists"], "lw": {**settings, "weights": ":" if in_items else "ww"}}
    if r.random() < 0.3:
        spec["hash_buckets"] = {**spec["hash_buckets"], "lw": r.randrange(2, 40)}
    if "lw" not in spec["hash_buckets"] and r.random() < 0.3:
        spec["categorical"] = [*spec["categorical"], "lc"]
        spec["vocabularies"] = {**spec.get("vocabularies", {}), "weighted": ["lw", "lc"]}
    for row in rows:
        if "lc" in spec["categorical"]:
            row["lc"] = r.choice(["a", "b:c", "7", "true", None])
        items = [r.choice(["a", "b:c", "7.0", "True", "Ü", ""]) for _ in range(r.randrange(0, 6))]
        weights = [r.choice([0.0, 1.0, 0.1, 1e-3, 33.25, r.random()]) for _ in items]
        if in_items:
            row["lw"] = [f"{item}:{weight}" for item, weight in zip(items, weights, strict=True)]
        else:
            items = ["a", *items[1:]] if items == [""] else items  # as text, that is an empty list
            row["lw"], row["ww"] = items, weights
    kinds = {"lw": pa.list_(pa.string())}
    if "lc" in spec["categorical"]:
        kinds["lc"] = pa.string()
    return kinds if in_items else {**kinds, "ww": pa.list_(pa.float64())}


def draw_number_label(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log a label of numbers, which may be missing or restricted and may restrict another, or none."""
    if r.random() < 0.6:
        return {}
    task: dict[str, Any] = {"kind": "number"}
    gaps: list[float | None] = []
    if r.random() < 0.6:
        task["missing"], gaps = True, [None, math.nan]
    elif r.random() < 0.5:
        task["where"] = r.choice(["click = 1", "x > 0", "click = 1 and x < 1"])
    spec["labels"] = [*spec["labels"], "watch"] if r.random() < 0.7 else ["watch", *spec["labels"]]
    spec["tasks"] = {**spec.get("tasks", {}), "watch": task}
    if "pay" in spec["tasks"] and r.random() < 0.3:
        spec["tasks"]["pay"]["where"] = "watch > 1"
    low, scale = r.choice([0.0, -1e9]), r.choice([1e-3, 1.0, 1e4])
    for row in rows:
        value = r.choice([max(low, r.gauss(0, scale)), r.expovariate(1 / scale), 0.0, 7.0, 0.1, 1e-50])
        row["watch"] = r.choice(gaps) if gaps and r.random() < 0.4 else value
    return {"watch": pa.float64()}


def draw_groups(r: random.Random, spec: dict[str, Any], rows: list[Row]) -> dict[str, pa.DataType]:
    """Give the log groups whose rows stay together: those of the group id, of a feature, of a column, or none."""
    if r.random() < 0.6:
        return {}
    features = [name for name in spec["categorical"] if name.endswith("narrow")]
    spec["together"] = r.choice(["g", "q", "q", *features])
    if spec["together"] != "q":
        return {}
    is_text, groups = r.random() < 0.5, r.randrange(1, len(rows))
    for row in rows:
        number = r.randrange(groups)
        row["q"] = f"r {number}" if is_text else number - 3
    return {"q": pa.string() if is_text else pa.int64()}


def draw_negatives(r: random.Random, spec: dict[str, Any]) -> None:
    """Let the log be down-sampled where it may be."""
    is_made = "made" in spec.get("sequences", {})
    if len(spec["labels"]) == 1 and "watch" not in spec["labels"] and not is_made and "together" not in spec:
        spec["negatives"] = r.choice([1.0, 0.2, 0.5, 0.9])
