"""tools/bench_fuxictr.py with a stand-in for FuxiCTR's process: files, turns, medians, errors."""

import importlib
import json
import os
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ssr_rec.data.schema import Schema
from tests.sequence_log import KINDS, LENGTH, write_sequence_log
from tests.shard_edits import replace

TOOLS = Path(__file__).parents[2] / "tools"
SECONDS = [9.0, 1.0, 4.0, 2.0]
"""Of the stand-in's turns; the first is the one that does not count."""
CHILD = f"""
import json, os, sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
saw = {{split: {{k: v.tolist() for k, v in np.load(folder / (split + ".npz")).items()}} for split in ("train", "test")}}
saw |= {{"feature_map": json.loads((folder / "feature_map.json").read_text()), "cores": len(os.sched_getaffinity(0))}}
saw |= {{"model": sys.argv[2], "threads": os.environ["OMP_NUM_THREADS"]}}
print(json.dumps({{"dense_parameters": 7, "versions": saw}}), flush=True)
seconds = iter({SECONDS})
for line in sys.stdin:
    request = json.loads(line)
    assert request.get("steps", 2) == 2, request
    answer = {{"seconds": next(seconds)}} if "steps" in request else {{"auc": 0.5 + request["seed"] / 10, "epochs": 1}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_fuxictr")


@pytest.fixture
def child(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "child.py"
        path.write_text(text)
        return path

    return write


def arguments(dataset: Path, *more: str, python: str = sys.executable) -> list[str]:
    return ["--data", str(dataset), "--fuxictr-python", python, "--steps", "2", "--turns", "3", *more]


@pytest.mark.slow
def test_turns_medians_and_auc(bench, child, dataset, capsys):
    before = os.sched_getaffinity(0), torch.get_num_threads()
    more = ["--models", "deepfm", "--label", "like", "--auc", "1", "--seeds", "2"]
    assert bench.main(arguments(dataset, *more), child(CHILD)) == 0
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])

    saw = figures["versions"]["fuxictr"]
    assert (saw["model"], saw["cores"], saw["threads"]) == ("deepfm", 1, "1")
    sizes = {n: spec["vocab_size"] for f in saw["feature_map"]["features"] for n, spec in f.items()}
    assert sizes == {"user": 50, "item": 30, "price": 8} and saw["feature_map"]["labels"] == ["like"]
    assert {len(column) for column in saw["train"].values()} == {1_003}
    assert set(saw["test"]) == {"user", "item", "price", "like"} and set(saw["test"]["like"]) == {0, 1}

    model = figures["models"]["deepfm"]
    # Two steps of 1,024 rows in 1, 4 and 2 seconds.
    assert (model["samples_per_s"]["fuxictr"], model["spread"]["fuxictr"]) == (1_024, [512, 2_048])
    assert model["ratio"] == pytest.approx(model["samples_per_s"]["ours"] / 1_024, rel=1e-3)
    # 3 features of dim 16, three ReLU layers, one head.
    assert model["dense_parameters"] == {"ours": 49 * 320 + 2 * 321 * 320 + 321, "fuxictr": 7}
    assert model["test_auc"]["fuxictr"] == [0.5, 0.6]
    ours = model["test_auc"]["ours"]
    assert len(set(ours)) == 2 and all(0 < value < 1 for value in ours)


@pytest.fixture
def histories(tmp_path):
    """A log with two sequences, whose ids of clicked kinds are 1 or more."""
    folder = write_sequence_log(tmp_path / "log", {"train": 90, "validation": 20, "test": 30})
    for path in folder.glob("*/*.parquet"):
        table = pq.read_table(path)
        kinds = [[max(1, kind) for kind in row] for row in table["clicked_kind"].to_pylist()]
        pq.write_table(replace(table, "clicked_kind", kinds), path)
    return folder


def test_din_gets_one_history_padded_on_the_right(bench, histories, tmp_path):
    schema = bench.narrowed(Schema.read(histories), "din", None)
    assert schema.feature_names == ["user", "item_id", "kind_id", "clicked_kind"]
    assert bench.history_and_target(schema) == ("clicked", "clicked_kind", "kind_id")
    config = bench.our_config(histories, schema, "din", tmp_path)
    (sequence,) = config.sequences.items()
    assert (sequence[0], sequence[1].target, sequence[1].encoder.name) == ("clicked", ["kind_id"], "din")

    bench.write_for_fuxictr(histories, schema, tmp_path / "out", {"loader": "npz", "target": "kind_id"})
    arrays = np.load(tmp_path / "out" / "test.npz")
    rows = pq.read_table(histories / "test")["clicked_kind"].to_pylist()
    assert arrays["clicked_kind"].tolist() == [row + [0] * (LENGTH - len(row)) for row in rows]
    found = json.loads((tmp_path / "out" / "feature_map.json").read_text())
    assert found["features"][-1]["clicked_kind"] == {
        "source": "", "type": "sequence", "vocab_size": KINDS, "max_len": LENGTH, "share_embedding": "kind_id"
    }  # fmt: skip
    assert (found["num_fields"], found["input_length"]) == (4, 3 + LENGTH)


def test_histories_that_fuxictr_would_read_otherwise_are_refused(bench, histories, dataset, tmp_path):
    schema = bench.narrowed(Schema.read(histories), "din", None)
    with pytest.raises(ValueError, match="written for npz alone"):
        bench.write_for_fuxictr(histories, schema, tmp_path / "a", {"loader": "parquet", "target": "kind_id"})
    with_zeros = Schema.read(histories).select(["item_id", "clicked_item"], None)
    with pytest.raises(ValueError, match=r"clicked_item: missing values \(id 0\)"):
        bench.write_for_fuxictr(histories, with_zeros, tmp_path / "b", {"loader": "npz", "target": "item_id"})
    with pytest.raises(ValueError, match="no sequence that shares a vocabulary"):
        bench.narrowed(Schema.read(dataset), "din", None)


@pytest.mark.skipif(util.find_spec("fuxictr") is not None, reason="this Python has FuxiCTR")
def test_a_python_without_fuxictr(bench, dataset, capsys):
    assert bench.main(arguments(dataset)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sys.executable in line and line.endswith("pip install fuxictr==2.3.10")


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("raise SystemExit('boom')", [], "ended with 1: boom"),
        (CHILD.replace("next(seconds)}", "1 / 0}"), ["--models", "deepfm"], "ZeroDivisionError"),
        ("print('hello')", [], "'hello', which is not JSON"),
        (CHILD, ["--cores", "4096"], "--cores 4096"),
        (CHILD, ["--label", "buy"], "label 'buy'"),
    ],
)
def test_what_goes_wrong_is_one_line(bench, child, dataset, capsys, text, more, message):
    assert bench.main(arguments(dataset, *more), child(text)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_no_such_python(bench, dataset, capsys):
    assert bench.main(arguments(dataset, python="/nowhere/python")) == 2
    assert "--fuxictr-python /nowhere/python: No such file" in capsys.readouterr().err
