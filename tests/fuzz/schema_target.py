"""schema.json, mutated as bytes, as a tree, and as a file.

The promise: refused by one line that names the folder, or taken for exactly what the text says. A file whose checksum
was neither recomputed nor removed must say what it said before; one changed on purpose must reach the schema
uncoerced, and its shards must give the rows they hold or be refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssr_rec.data import shards
from ssr_rec.data.schema import Schema
from tests.conftest import write_dataset
from tests.fuzz.batches import Columns, read_columns, read_splits
from tests.fuzz.harness import Target, refusal
from tests.fuzz.mutators import damage_bytes, damage_tree, pick, replace_by_no_file, write


@dataclass
class State:
    folder: Path
    text: str
    rows: dict[str, Columns]


def prepare(folder: Path) -> State:
    shards.ROWS_PER_SHARD = 40
    write_dataset(folder / "data", {"train": 90, "validation": 25, "test": 20}, rows_in_group=20)
    text = (folder / "data" / "schema.json").read_text()
    return State(folder / "data", text, read_splits(folder / "data", Schema.read(folder / "data")))


def run(state: State, folder: Path, rng: np.random.Generator) -> str:
    for split in ("train", "validation", "test"):
        (folder / split).symlink_to(state.folder / split)
    path = folder / "schema.json"
    sealed = draw(rng, state, path)
    try:
        schema = Schema.read(folder)
    except Exception as error:
        return refusal(error, str(path))
    values = json.loads(path.read_text())
    checksum = values.pop("checksum", None)
    if checksum is not None and sealed:
        assert canonical(values) == canonical(stored(state.text)), "another content under the same checksum"
    # What the text leaves out has its default; what it says is there as it says it.
    assert canonical(normal(schema.model_dump(mode="json", exclude_unset=True))) == canonical(normal(values))
    return check_rows(state, folder, schema)


def draw(rng: np.random.Generator, state: State, path: Path) -> bool:
    """Write one mutated file; whether its checksum, if it has one, is that of the intact file."""
    kind = pick(rng, ("bytes", "bytes", "stale", "unsealed", "resealed", "resealed", "other size", "reordered", "file"))
    if kind == "file":
        path.write_text(state.text)
        replace_by_no_file(rng, path)
    elif kind == "bytes":
        path.write_bytes(damage_bytes(rng, state.text.encode()))
    elif kind == "reordered":
        values = json.loads(state.text)
        path.write_text(
            json.dumps({key: values[key] for key in rng.permutation(list(values))}, indent=pick(rng, (None, 3)))
        )
    elif kind == "other size":
        values = stored(state.text)
        feature = pick(rng, values["features"])
        feature["num_embeddings"] = int(rng.integers(1, 60))
        path.write_text(seal(write(values), None))
    else:
        values = stored(state.text)
        for _ in range(pick(rng, (1, 1, 2))):
            values = damage_tree(rng, values)
        text = write(values)
        if kind == "stale":
            text = seal(text, json.loads(state.text)["checksum"])
        elif kind == "resealed":
            text = seal(text, None)
        path.write_bytes(text.encode())
    return kind in ("bytes", "stale", "reordered", "file")


def stored(text: str) -> dict[str, Any]:
    values = json.loads(text)
    del values["checksum"]
    return values


def seal(text: str, checksum: str | None) -> str:
    """Add a checksum; None: the one that fits, where the text is JSON at all."""
    if checksum is None:
        try:
            checksum = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()
        except (ValueError, RecursionError):
            return text
    return text.rstrip("}") + "}" * (len(text) - len(text.rstrip("}")) - 1) + f', "checksum": "{checksum}"}}'


def canonical(value: Any) -> str:
    """Text in which 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


def normal(values: dict[str, Any]) -> dict[str, Any]:
    """With the paths of shards and vocabularies in their shortest form, and whole floats as floats."""
    for feature in values["features"]:
        for key in ("low", "high"):
            if key in feature["encoding"]:
                feature["encoding"][key] = float(feature["encoding"][key])
        if "file" in feature["encoding"]:
            feature["encoding"]["file"] = str(PurePosixPath(feature["encoding"]["file"]))
    for split in values["splits"].values():
        split["positive_rate"] = {label: float(rate) for label, rate in split["positive_rate"].items()}
        for shard in split["shards"]:
            shard["path"] = str(PurePosixPath(shard["path"]))
    return values


def check_rows(state: State, folder: Path, schema: Schema) -> str:
    """The rows of every split whose shards are as before are those of the intact schema, column by column."""
    intact = Schema.model_validate(stored(state.text))
    outcome = "taken"
    for split, found in schema.splits.items():
        try:
            columns = read_columns(folder, schema, split)
        except Exception as error:
            outcome = refusal(error, str(folder))
            continue
        if split in intact.splits and found.shards == intact.splits[split].shards:
            expected = state.rows[split]
            for name, values in columns.items():
                assert values == (expected[name] if name != "group" or schema.group_id else []), f"{split}: {name}"
    return outcome


TARGET = Target("schema", prepare, run)
