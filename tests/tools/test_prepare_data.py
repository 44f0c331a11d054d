"""The command line of the preparation: one JSON line on success, one error line and status 2 on bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ssr_rec.data.schema import Schema
from tests.prepare_log import ROOT, SPEC, make_rows, write_csv

SCRIPT = ROOT / "tools" / "prepare_data.py"
COMMAND = [sys.executable, str(SCRIPT)]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def prepare_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(prepare_data: ModuleType, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line within this process: exit status, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = prepare_data.main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def write_spec(folder: Path) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


def test_table(tmp_path: Path, call: Call) -> None:
    log = write_csv(make_rows(2000), tmp_path / "log.csv")
    spec, output = write_spec(tmp_path), tmp_path / "out"
    options = (
        "--ratios",
        "6",
        "2",
        "2",
        "--num-buckets",
        "8",
        "--max-list-length",
        "2",
        "--min-count",
        "4",
        "--spread-ids",
    )
    status, out, err = call("table", "--spec", spec, "--input", log, "--output", output, *options)
    assert status == 0, err
    (line,) = out.splitlines()
    figures = json.loads(line)
    schema = Schema.read(output)
    assert figures["rows"] == 2000 == sum(figures["splits"].values())
    assert figures["splits"] == {name: split.num_rows for name, split in schema.splits.items()}
    assert figures["splits"]["train"] == pytest.approx(1200, abs=110)
    assert figures["rows_per_s"] == pytest.approx(2000 / figures["seconds"], rel=0.01)
    by_name = {feature.name: feature for feature in schema.features}
    assert by_name["tags"].max_length == 2
    assert by_name["price"].num_embeddings == 9
    assert schema.preparation["min_count"] == 4 and schema.preparation["spread_ids"] is True
    for progress in err.splitlines():
        assert "rows/s" in progress


def test_time_options(tmp_path: Path, call: Call) -> None:
    log = write_csv(make_rows(2000), tmp_path / "log.csv")
    options = ("--time-column", "day", "--boundaries", "2024-01-11", "2024-01-16")
    _, out, _ = call("table", "--spec", write_spec(tmp_path), "--input", log, "--output", tmp_path / "out", *options)
    assert json.loads(out)["splits"] == {"train": 1000, "validation": 500, "test": 500}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("criteo", "--input", "none.tsv"), "none.tsv: no such file"),
        (("table", "--input", "none.tsv"), "preset table needs --spec"),
        (("criteo", "--spec", "x.yaml", "--input", "none.tsv"), "--spec is for preset table"),
        (("criteo", "--boundaries", "1", "2", "--input", "none.tsv"), "--boundaries needs --time-column"),
        (("criteo", "--ratios", "1", "0", "1", "--input", "none.tsv"), "three positive shares"),
        (("criteo", "--hash-buckets", "0", "--input", "none.tsv"), "hash_buckets: 0"),
        (("criteo", "--memory-limit", "lots", "--input", __file__), "--memory-limit lots"),
    ],
)
def test_bad_options(tmp_path: Path, call: Call, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = call(*arguments, "--output", tmp_path / "out")
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(tmp_path: Path, call: Call) -> None:
    (tmp_path / "train.tsv").write_text("0\t1\n")
    status, _, said = call("criteo", "--input", tmp_path / "train.tsv", "--output", tmp_path / "out")
    assert status == 2
    assert said.splitlines() == [
        f"error: {tmp_path}/train.tsv: row 1 ('0\\t1'): not the 40 columns of a row; "
        "correct it, or set text.delimiter and text.quote"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    log = write_csv(make_rows(20_000), tmp_path / "log.csv")
    output = tmp_path / "made" / "out"
    # Twenty times the same file under as many names, so that a late signal still finds work to stop.
    logs = [str(shutil.copy(log, tmp_path / f"log{n}.csv")) for n in range(20)]
    arguments = ["table", "--spec", str(write_spec(tmp_path)), "--input", *logs, "--output", str(output)]
    child = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stderr is not None
    child.stderr.readline()  # the log is read, the rest of the work is under way
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert list((tmp_path / "made").iterdir()) == []
