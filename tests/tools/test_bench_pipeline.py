"""tools/bench_pipeline.py: every stage in a process of its own, figures that add up, FuxiCTR's input."""

import importlib
import json
import os
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssr_rec.data.schema import Schema

CRITEO_LINE = "\t".join(["1", *(str(i) for i in range(13)), *(f"{i:08x}" for i in range(26))]) + "\n"
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("PYTHONPATH", str(TOOLS.parent))
    return importlib.import_module("bench_pipeline")


def figures(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_stages_are_measured_apart(bench, tmp_path, capsys):
    work, plot = tmp_path / "work", tmp_path / "plots" / "curves.png"
    stages = ["--stages", "draw", "prepare", "read", "--rows", "9000", "--ids", "50", "--plot", str(plot)]
    assert bench.main(["--work", str(work), *stages]) == 0
    found = figures(capsys)
    assert set(found) == {"draw", "prepare", "read", "hardware", "versions"}
    prepared = Schema.read(work / "prepared-9000")
    kinds = [feature.kind for feature in prepared.features]
    assert (kinds.count("categorical"), kinds.count("numeric"), kinds.count("list")) == (26, 13, 1)
    rows = {"draw": 9_000, "prepare": 9_000, "read": prepared.splits["train"].num_rows}
    for name, [entry] in ((name, found[name]) for name in rows):
        assert entry["rows"] == rows[name]
        assert entry["rows_per_s"] == pytest.approx(rows[name] / entry["seconds"], rel=1e-3)
        assert entry["rows_per_cpu_s"] == pytest.approx(rows[name] / entry["cpu_seconds"], rel=1e-3)
        assert 50 < entry["peak_mb"] < 2_000
    # Memory is that of the stage's own process, and drawing needs no torch.
    assert found["draw"][0]["peak_mb"] < found["read"][0]["peak_mb"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_memory_is_that_of_a_command_and_its_children(bench):
    def peak(megabytes: int) -> float:
        inner = f"import time; x = b'1' * ({megabytes} * 10**6); time.sleep(.3)"
        return bench.run(
            [sys.executable, "-c", f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {inner!r}])"]
        )[1]

    large, small = peak(200), peak(1)
    assert large - small == pytest.approx(199, abs=20) and small < 50


@pytest.mark.slow
def test_reader_against_model_and_the_whole_job(bench, tmp_path, capsys):
    work = ["--work", str(tmp_path), "--rows", "20000", "--ids", "50", "--turns", "1", "--steps", "4"]
    assert bench.main([*work, "--batch-size", "256", "--stages", "draw", "consume", "train", "--ranks", "1", "2"]) == 0
    found = figures(capsys)
    [consumed] = found["consume"]
    assert consumed["features"] == 39 and consumed["ratio"] == pytest.approx(
        consumed["reader"] / consumed["model"], abs=0.05
    )
    assert consumed["rows"] == 2 * (20_000 + 4 * 256)
    assert [run["ranks"] for run in found["train"]] == [1, 2]
    for run in found["train"]:
        assert run["rows"] == 4 * 256 and 0 <= run["data_wait"] < 1 and run["peak_mb"] > 100


def stand_in(path: Path, rows: int) -> Path:
    """In the place of FuxiCTR's Python: keeps what it was asked, and answers."""
    answer = json.dumps({"rows": rows, "seconds": rows / 100, "versions": {"fuxictr": "0"}})
    path.write_text(
        f"#!/bin/sh\nprintf '%s' \"$2\" > {path}.asked\ncp -r $(dirname $0)/work {path}.saw\necho '{answer}'\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_fuxictr_gets_the_same_rows(bench, tmp_path, capsys):
    ratings = tmp_path / "ratings.parquet"
    numbers = dict.fromkeys(("user_id", "movie_id", "age", "occupation", "year", "rating", "timestamp"), range(500))
    text = {name: [str(i % 7) for i in range(500)] for name in ("gender", "zip_code")}
    lists = {"genres": [[str(i % 3)] * (i % 4) for i in range(500)], "label": [i % 2 for i in range(500)]}
    table = pa.table({name: pa.array(values) for name, values in (numbers | text | lists).items()})
    pq.write_table(table, ratings)
    python = stand_in(tmp_path / "python", 500)
    arguments = ["--work", str(tmp_path / "work"), "--stages", "fuxictr", "--fuxictr-python", str(python)]
    assert bench.main([*arguments, "--ml1m-half", str(ratings), "--turns", "1"]) == 0
    found = figures(capsys)["fuxictr"]["ml1m_half"]
    assert found["rows_per_s"]["fuxictr"] == 100 and found["rows"] == 500
    assert found["ratio"] == pytest.approx(found["rows_per_s"]["ours"] / 100, abs=0.01)
    asked = json.loads(Path(f"{python}.asked").read_text())
    assert asked["lists"] == {"genres": 6} and asked["label"] == "label" and "rating" not in asked["categorical"]
    [made] = Path(f"{python}.saw").iterdir()
    splits = {split: pd.read_parquet(made / f"{split}.parquet") for split in ("train", "valid", "test")}
    assert [len(frame) for frame in splits.values()] == [400, 50, 50]
    raw = pd.read_parquet(ratings)
    for name in asked["categorical"]:
        raw[name] = raw[name].astype(str)
    raw["genres"] = ["^".join(items) for items in raw["genres"]]
    rows = sorted(map(str, pd.concat(splits.values()).to_numpy().tolist()))
    assert rows == sorted(map(str, raw.to_numpy().tolist()))


def test_criteo_is_repeated_and_gets_names(bench, tmp_path, monkeypatch):
    logs = importlib.import_module("pipeline_logs")
    monkeypatch.setattr(logs, "CRITEO_ROWS", 60)
    given = tmp_path / "train.txt"
    given.write_text(CRITEO_LINE * 10)
    log = logs.criteo_log(given, tmp_path)
    assert log.raw.read_text() == given.read_text() * 6
    made = log.write_for_fuxictr(tmp_path)
    frames = [pd.read_csv(tmp_path / f"{split}.csv", dtype=str) for split in ("train", "valid", "test")]
    assert [len(frame) for frame in frames] == [48, 6, 6]
    assert {tuple(row) for frame in frames for row in frame.to_numpy()} == {tuple(CRITEO_LINE.split())}
    assert set(frames[0].columns) == {*made["categorical"], *made["numeric"], made["label"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "read"], "drawn-1000000"),
        (["--stages", "fuxictr", "--fuxictr-python", "/nowhere/python", "--criteo", "train.txt"], "/nowhere/python"),
        (["--stages", "fuxictr", "--fuxictr-python", "/nowhere/python", "--criteo", __file__], "criteo.tsv: "),
    ],
)
def test_what_is_missing_is_said_in_a_line(bench, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(importlib.import_module("pipeline_logs"), "CRITEO_ROWS", 60)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text(CRITEO_LINE)
    if "fuxictr" in arguments:
        monkeypatch.setattr(bench, "stage", lambda *_, **__: {"rows": 1, "peak_mb": 1})
    assert bench.main(["--work", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_fuxictr_needs_its_python(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--work", str(tmp_path), "--stages", "fuxictr"])
    assert end.value.code == 2 and "--fuxictr-python" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
