"""What docs/data.md makes of a log, in plain Python: written from the page, apart from the preparation's code."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def text_of(value: Any) -> str | None:
    """Return the one text of a value of a categorical or list column; None for missing."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, float):
        return str(int(value))
    text = str(value)
    if text in ("True", "TRUE"):
        return "true"
    if text in ("False", "FALSE"):
        return "false"
    return text.split(".")[0] if re.fullmatch(r"-?[0-9]+\.0+", text) else text


def splits_of(rows: Sequence[Row], spec: dict[str, Any], places: Sequence[tuple[int, int]]) -> list[str]:
    """Return the split of each row; ``places``: what each is sorted by."""
    rule = spec["split"]
    if rule["type"] == "time":
        first, second = rule["boundaries"]
        times = [row[rule["column"]] for row in rows]
        return ["train" if t < first else "validation" if t < second else "test" for t in times]
    total = sum(rule["ratios"])
    upto = [rule["ratios"][0] / total, (rule["ratios"][0] + rule["ratios"][1]) / total]
    shares = [x / 2**31 for x, _ in places]
    return ["train" if share < upto[0] else "validation" if share < upto[1] else "test" for share in shares]


def mixed(x: int, factors: Sequence[int]) -> int:
    for shift, factor in zip((16, 15, 13), factors, strict=True):
        x = ((x ^ (x >> shift)) * factor) % 2**31
    return x ^ (x >> 16)


def order_of(number: int, seed: int) -> tuple[int, int]:
    """Return what the rows of a split are sorted by."""
    salt = (seed * 0x9E3779B1 + 0x2C1B3C6D) % 2**31
    x = (number ^ ((number >> 31) * 0x7FEB352D + salt)) % 2**31
    return mixed(x, (0x7FEB352D, 0x046CA68B, 0x05EBCA6B)), number >> 31


def places_of(rows: Sequence[Row], together: str | None, seed: int) -> list[tuple[int, int]]:
    """Return what the rows of a split are sorted by; with ``together``, groups by their first row, and rows in them."""
    if together is None:
        return [order_of(number, seed) for number in range(len(rows))]
    firsts: dict[str | None, int] = {}
    found = []
    for number, row in enumerate(rows):
        first = firsts.setdefault(text_of(row[together]), number)
        found.append((order_of(first, seed)[0], number - first))
    return found


def is_missing(value: Any) -> bool:
    return value is None or value != value


def ids_of_groups(rows: Sequence[Row], name: str) -> list[int]:
    """Return the stored id of each row's group: the number, or 15 hexadecimal digits of the md5 of its text."""
    texts = [str(text_of(row[name])) for row in rows]
    whole = all(re.fullmatch(r"-?[0-9]+", text) for text in texts)
    return [int(text) if whole else int(hashlib.md5(text.encode()).hexdigest()[:15], 16) for text in texts]


def md5(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest(), 16)


def float32(value: float) -> float:
    """Return the nearest float32, as C rounds it."""
    return float(ctypes.c_float(value).value)


COMPARISONS = {"=": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}


def holds(row: Row, conditions: str) -> bool:
    """Return whether a row fulfils ``click = 1 and n0 > 0`` and the like, which a missing value does not."""
    parts = [condition.split(" ") for condition in conditions.split(" and ")]
    return all(not is_missing(row[name]) and COMPARISONS[sign](row[name], float(n)) for name, sign, n in parts)


class Reference:
    """The encodings fitted on the training rows, and the rows they make.

    Attributes:
        dense: dense column -> mean and deviation of what its training rows hold.
        names: features in the order of the spec.
        made: feature of a history made from the log -> its source column, None for the age.
        rows: those given, with the raw values of these.
        splits: split -> rows in their stored order, each ids by feature, labels, and the group id.
    """

    def __init__(self, rows: Sequence[Row], spec: dict[str, Any], seed: int) -> None:
        self.spec = spec
        self.lists: dict[str, dict[str, Any]] = dict(spec.get("lists", {}))
        given = spec.get("sequences", {}).get("given", {})
        numbers = [*given.get("numeric", []), *([given["age"]] if "age" in given else [])]
        for name in (*given.get("columns", []), *numbers):
            self.lists[name] = {"max_length": given["max_length"], "keep": "last"}
        places = places_of(rows, spec.get("together"), seed)
        chosen = self._without_some_negatives(rows, splits_of(rows, spec, places), places)
        self.made: dict[str, str | None] = {}
        self.rows = self._with_histories(rows, spec.get("sequences", {}).get("made"))
        self.vectors = {name: (one["of"], one["values"]) for name, one in spec.get("vectors", {}).items()}
        self.names = [*spec["categorical"], *spec["numeric"], *self.lists, *self.vectors, *self.made]
        train = [row for row, split in zip(rows, chosen, strict=True) if split == "train"]
        self.dense_edges: dict[str, list[float]] = {}
        self.dense = {name: self._scale(train, name) for name in spec.get("dense", {})}
        shared = {name: names for names in spec.get("vocabularies", {}).values() for name in names}
        self.vocabularies = {
            name: self._vocabulary(train, shared.get(name, [name]))
            for name in (*spec["categorical"], *self.lists)
            if name not in spec["hash_buckets"] and name not in numbers
        }
        self.ranges = {name: self._range(train, name) for name in (*spec["numeric"], *numbers)}
        if "made_age" in self.made:
            times = [row["t"] for row in train] or [0]
            self.ranges["made_age"] = (0.0, transformed(float(max(times) - min(times))) or 0.0)
        groups = {
            name: ids_of_groups(rows, name) for name in {spec["group_id"], spec.get("together", spec["group_id"])}
        }
        self.splits: dict[str, list[Row]] = {split: [] for split in ("train", "validation", "test")}
        self.first_rows = dict.fromkeys(self.splits, 0)
        for number in sorted(range(len(rows)), key=lambda number: places[number]):
            if chosen[number] not in self.splits:
                continue
            self.first_rows[chosen[number]] += places[number][1] == 0
            row = self.rows[number]
            stored = {name: self.encode(row, name) for name in self.names}
            stored |= {f"__weights__{name}": self.weights(row, name) for name in self.weighted}
            stored |= {name: None if is_missing(v := row[name]) else float(v) for name in self.dense}
            stored |= {name: list(map(float, row[name] or [])) for name in spec.get("row_vectors", {})}
            stored |= {label: self._label(row, label) for label in spec["labels"]}
            if "weight" in spec:
                stored["__weight__"] = float32(row[spec["weight"]])
            for name, ids in groups.items():
                stored["__group_id__" if name == spec["group_id"] else "__together__"] = ids[number]
            self.splits[chosen[number]].append(stored)

    @property
    def weighted(self) -> list[str]:
        """Return the lists whose items have weights."""
        return [name for name, one in self.lists.items() if "weights" in one]

    def weights(self, row: Row, name: str) -> list[float]:
        """Return the weights of the kept items of a row's list."""
        where = self.lists[name]["weights"]
        if where == ":":
            return [float32(float(item[item.rindex(":") + 1 :])) for item in self._kept(row, name)]
        return [float32(weight) for weight in self._cut(row[where], name)]

    def _without_some_negatives(
        self, rows: Sequence[Row], chosen: Sequence[str], places: Sequence[tuple[int, int]]
    ) -> list[str]:
        """Return the splits with "" for the rows of training that ``negatives`` leaves out."""
        bound = self.spec.get("negatives", 1.0) * 2**31
        drawn = [mixed(x, (0x05EBCA6B, 0x7FEB352D, 0x046CA68B)) < bound for x, _ in places]
        return [
            split if split != "train" or row[self.spec["labels"][0]] == 1 or kept else ""
            for row, split, kept in zip(rows, chosen, drawn, strict=True)
        ]

    def _label(self, row: Row, label: str) -> float | None:
        task = self.spec.get("tasks", {}).get(label, {})
        is_number = task.get("kind") == "number"
        if is_missing(row[label]) or ("where" in task and not holds(row, task["where"])):
            return None if is_number else -1
        return float32(row[label]) if is_number else int(row[label])

    def counted(self, split: str, label: str) -> list[float]:
        """Return the label of the rows of a split that count for it."""
        rows = [row for row in self.splits[split] if row.get("__weight__", 1.0) > 0]
        is_number = label in self.numbers_of
        return [row[label] for row in rows if (row[label] is not None if is_number else row[label] >= 0)]

    @property
    def numbers_of(self) -> list[str]:
        """Return the labels that are numbers."""
        return [label for label, task in self.spec.get("tasks", {}).items() if task.get("kind") == "number"]

    def is_refused(self, said: str) -> bool:
        """Return whether a refusal with these words is right."""
        labels = self.spec["labels"]
        if "split is empty" in said:
            return not all(self.splits.values())
        if " counts (" in said:
            return not all(self.counted(split, label) for split in self.splits for label in labels)
        if "no row to train on has it" in said:
            train = self.splits["train"]
            return any(all(row[label] is None for row in train) for label in self.numbers_of)
        counted = self.counted("train", labels[0])
        return "no negative row is left" in said and bool(counted) and all(counted)

    def figures(self) -> dict[str, Any]:
        """Return what the schema says of splits, number labels and dense columns."""
        found: dict[str, Any] = {}
        is_partial = "weight" in self.spec or "tasks" in self.spec
        for split, rows in self.splits.items():
            counted = {label: self.counted(split, label) for label in self.spec["labels"]}
            binary = {label: values for label, values in counted.items() if label not in self.numbers_of}
            rates = {label: sum(values) / len(values) for label, values in binary.items()}
            groups = self.first_rows[split] if "together" in self.spec else None
            sizes = {label: len(values) for label, values in counted.items()} if is_partial else {}
            found[split] = (len(rows), rates, sizes, groups)
        for label in self.numbers_of:
            values = [row[label] for rows in self.splits.values() for row in rows if row[label] is not None]
            train = [row[label] for row in self.splits["train"] if row[label] is not None]
            logs = moments([math.log1p(v) for v in train]) if min(values) >= 0 else (None, None)
            found[label] = (*moments(train), *logs, min(values), max(values))
        return found | self.dense_edges

    def _scale(self, train: Sequence[Row], name: str) -> tuple[float, float]:
        values = [self._transformed(row[name], name) for row in train if not is_missing(row[name])]
        mean, std = moments(values) if values else (0.0, 1.0)
        scaled = sorted(float32(min(max((value - mean) / std, -1000.0), 1000.0)) for value in values)
        bins = self.spec["dense_bins"]
        edges = sorted({scaled[k * (len(scaled) - 1) // bins] for k in range(bins + 1)}) if scaled else [0.0, 1.0]
        self.dense_edges[name] = edges if len(edges) > 1 else [edges[0], edges[0] + 1.0]
        return mean, std

    def _transformed(self, value: float, name: str) -> float:
        kind = self.spec["dense"]
        is_log = isinstance(kind, dict) and kind[name] == "log"
        return math.copysign(math.log(1.0 + abs(value)), value) if is_log else float(value)

    def numbers(self, row: Row) -> list[float]:
        """Return what a model sees of a row's dense columns and vectors, NaN where missing."""
        found = []
        for name, (mean, std) in self.dense.items():
            value = math.nan if is_missing(row[name]) else (self._transformed(row[name], name) - mean) / std
            found.append(min(max(value, -1000.0), 1000.0) if value == value else value)
        for name, size in self.spec.get("row_vectors", {}).items():
            found += [float32(x) for x in row[name]] if row[name] else [math.nan] * size
        return found

    def _with_histories(self, rows: Sequence[Row], settings: dict[str, Any] | None) -> list[Row]:
        """Return the rows with the raw values of the last earlier events of their group, and their ages."""
        if settings is None:
            return list(rows)
        wanted = settings["from_log"]
        self.made = {f"made_{column}": column for column in wanted["columns"]}
        self.made |= {"made_age": None} if wanted["age"] else {}
        found = []
        for row in rows:
            events = [one for one in rows if text_of(one["g"]) == text_of(row["g"]) and one["t"] < row["t"]]
            events = [one for one in events if "where" not in wanted or holds(one, wanted["where"])]
            events = sorted(events, key=lambda one: one["t"])[-settings["max_length"] :]
            history = {
                name: [float(row["t"] - one["t"]) if source is None else one[source] for one in events]
                for name, source in self.made.items()
            }
            found.append({**row, **history})
        return found

    def _items(self, row: Row, name: str) -> list[str | None]:
        items = self._kept(row, name) if name in self.lists else [row[name]]
        if self.lists.get(name, {}).get("weights") == ":":
            items = [item[: item.rindex(":")] for item in items]
        return [text_of(item) for item in items]

    def _kept(self, row: Row, name: str) -> list[Any]:
        return self._cut(row[name], name)

    def _cut(self, given: Sequence[Any] | None, name: str) -> list[Any]:
        settings, items = self.lists[name], list(given or [])
        most = settings["max_length"]
        return items[-most:] if settings.get("keep") == "last" else items[:most]

    def _vocabulary(self, train: Sequence[Row], names: Sequence[str]) -> dict[str, int]:
        texts = (text for row in train for name in names for text in self._items(row, name))
        counts = Counter(text for text in texts if text is not None)
        kept = [text for text, count in counts.items() if count >= self.spec["min_count"]]
        return {text: 2 + i for i, text in enumerate(sorted(kept, key=lambda t: (-counts[t], t.encode())))}

    def _range(self, train: Sequence[Row], name: str) -> tuple[float, float]:
        items = [item for row in train for item in (self._kept(row, name) if name in self.lists else [row[name]])]
        values = [found for found in map(transformed, items) if found is not None]
        return (min(values), max(values)) if values else (0.0, 0.0)

    def encode(self, row: Row, name: str) -> int | list[int]:
        """Return the id of a row's value, or those of its list."""
        if name in self.vectors:
            source, values = self.vectors[name]
            text = text_of(row[source])
            return 0 if text is None else values.index(text) + 2 if text in values else 1
        if name in self.made:
            of = self.made[name] or name
            return [self._bucket(v, of) if of in self.ranges else self._id(text_of(v), of) for v in row[name]]
        if name in self.ranges:
            if name in self.lists:
                return [self._bucket(item, name) for item in self._kept(row, name)]
            return self._bucket(row[name], name)
        ids = [self._id(text, name) for text in self._items(row, name)]
        return ids if name in self.lists else ids[0]

    def _bucket(self, value: Any, name: str) -> int:
        t, (low, high), buckets = transformed(value), self.ranges[name], self.spec["num_buckets"]
        if t is None:
            return 0
        if high <= low:
            return 1
        return 1 + min(max(math.floor((t - low) / ((high - low) / buckets)), 0), buckets - 1)

    def _id(self, text: str | None, name: str) -> int:
        if text is None:
            return 0
        if name in self.vocabularies:
            return self.vocabularies[name].get(text, 1)
        return 1 + md5(text) % self.spec["hash_buckets"][name]


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, 1 where that is 0."""
    mean = math.fsum(values) / len(values)
    return mean, (math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) if len({*values}) > 1 else 1.0)


def transformed(value: Any) -> float | None:
    if is_missing(value):
        return None
    return math.copysign(math.log(1.0 + abs(float(value))), float(value)) if value else 0.0
