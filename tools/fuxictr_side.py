"""Runs FuxiCTR's side of tools/bench_fuxictr.py from ours: starts its process, and writes the files that it reads."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssr_rec.common.errors import UserError
from ssr_rec.data.schema import SPLITS, Schema


class FuxiCTR:
    """Runs tools/fuxictr_child.py on one model; ``built`` is what it said first.

    Raises:
        ValueError: that Python is not there, has no FuxiCTR, or the child ended.
    """

    def __init__(self, python: str, child: Path, folder: Path, model: str, threads: int) -> None:
        self.python, self.errors = python, folder / f"{model}.stderr"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
        try:
            with self.errors.open("w") as errors:
                self.process = subprocess.Popen(
                    [python, str(child), str(folder), model],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        except OSError as error:
            raise UserError(f"--fuxictr-python {python}: {error.strerror}; give the python of a venv") from None
        try:
            self.built = self._answer()
        except ValueError:
            self.close()
            raise

    def ask(self, **request: int) -> dict[str, float]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                raise UserError(f"FuxiCTR's process said {line.strip()[:80]!r}, which is not JSON") from None
        self.process.wait()
        said = self.errors.read_text().strip().splitlines() or ["no message"]
        if "No module named 'fuxictr'" in said[-1]:
            raise UserError(f"{self.python} has no FuxiCTR; in a venv of its own: pip install fuxictr==2.3.10")
        raise UserError(f"FuxiCTR's process ended with {self.process.returncode}: {said[-1]}")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def history_and_target(schema: Schema) -> tuple[str, str, str]:
    """Return the sequence, its list feature and the single-valued feature of one vocabulary that DIN looks at.

    Raises:
        ValueError: the dataset has none.
    """
    singles = {f.vocabulary: f.name for f in reversed(schema.features) if f.kind != "list" and f.vocabulary}
    by_name = {feature.name: feature for feature in schema.features}
    for sequence in schema.sequences:
        for name in sequence.features:
            if by_name[name].vocabulary in singles:
                return sequence.name, name, singles[by_name[name].vocabulary]
    raise UserError(f"dataset {schema.name!r} has no sequence that shares a vocabulary with a single-valued feature")


def _padded(lists: pa.ChunkedArray, name: str, length: int) -> np.ndarray:
    """Return (rows, length) int64: each row's ids from the left, then zeros, which are padding in FuxiCTR."""
    whole = lists.combine_chunks()
    ids, lengths = whole.flatten().to_numpy(), pc.list_value_length(whole).to_numpy()
    if (ids == 0).any():
        raise UserError(f"{name}: missing values (id 0) in a history would be padding in FuxiCTR")
    found = np.zeros((len(lengths), length), np.int64)
    found[np.arange(length) < lengths[:, None]] = ids
    return found


def write_for_fuxictr(data: Path, schema: Schema, folder: Path, settings: dict[str, Any]) -> None:
    """Write the splits, the feature map and ``settings.json`` as fuxictr_child.py reads them.

    Args:
        schema: that of ``data``, narrowed to what is compared and one label; a list feature shares the table of
            ``settings["target"]`` and comes behind it.
        settings: sizes, and ``loader``: "npz" or "parquet".

    Raises:
        ValueError: a history with missing values, or in parquet.
    """
    folder.mkdir()
    columns = [*schema.feature_names, *schema.labels]
    lists = {feature.name: feature.max_length for feature in schema.features if feature.kind == "list"}
    if lists and settings["loader"] == "parquet":
        raise UserError("--fuxictr-loader parquet: histories are written for npz alone")
    for split in SPLITS:
        table = pq.read_table([data / shard.path for shard in schema.splits[split].shards], columns=columns)
        if settings["loader"] == "parquet":
            pq.write_table(table, folder / f"{split}.parquet")
            continue
        # One dtype throughout: FuxiCTR stacks the columns into one array, and floats would make it twice as large.
        arrays = {
            name: _padded(table[name], name, lists[name]) if name in lists else table[name].to_numpy().astype(np.int64)
            for name in columns
        }
        np.savez(folder / f"{split}.npz", **arrays)
    features: list[dict[str, Any]] = []
    for f in schema.features:
        spec: dict[str, Any] = {"source": "", "type": "categorical", "vocab_size": f.num_embeddings}
        if f.name in lists:
            spec |= {"type": "sequence", "max_len": f.max_length, "share_embedding": settings["target"]}
        features.append({f.name: spec})
    sizes = {
        "total_features": sum(f.num_embeddings for f in schema.features if f.name not in lists),
        "input_length": sum(f.max_length or 1 for f in schema.features),
    }
    feature_map = {"dataset_id": "data", "num_fields": len(features), "labels": schema.labels, "features": features}
    (folder / "feature_map.json").write_text(json.dumps(feature_map | sizes))
    (folder / "settings.json").write_text(json.dumps(settings))
