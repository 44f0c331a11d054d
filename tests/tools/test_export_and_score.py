"""The command lines of export and scoring: from a run folder to a file of probabilities."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from tests.made_run import make_run


def command(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export, score = command("export"), command("score")


@pytest.mark.slow
def test_from_a_run_to_scores(dataset, tmp_path, capsys):
    run = make_run(tmp_path / "run", dataset, ["--over_arch.name=mlp", "--over_arch.hidden=[8]", "--embeddings.dim=4"])
    artifact, rows = tmp_path / "artifact", dataset / "test" / "00000.parquet"
    strict = [str(run), "--out", str(artifact), "--tables", "int4", "--tolerance", "1e-7"]
    assert export.main(strict) == 2 and not artifact.exists()
    assert "more than the tolerance 1e-07" in capsys.readouterr().err
    assert export.main([*strict[:3], "--tables", "int8", "--rows", "100"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["tables"] == "int8" and report["parity"]["rows"] == 100
    out = tmp_path / "scores.parquet"
    assert score.main([str(artifact), "--input", str(rows), "--output", str(out), "--keep", "user", "click"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == 205 and "scored 205 rows" in captured.err
    found = pq.read_table(out)
    assert found.column_names == ["user", "click", "p_click", "p_like"]
    assert found["user"] == pq.read_table(rows)["user"]
    assert 0 < min(found["p_like"].to_pylist()) < max(found["p_like"].to_pylist()) < 1


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    assert export.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert score.main([str(tmp_path), "--input", "x.parquet", "--output", str(tmp_path / "y.parquet")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "not a run folder" in lines[0] and "not an artifact" in lines[1]
