"""The command line: reports, exit codes and messages."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssr_rec.embeddings.plan_file import read_plan
from tests.planning.small import SMALL, write_yaml
from tools.plan_sharding import main

TABLES = (
    "tables:\n  - {name: user, rows: 3000000, dim: 32}\n  - {name: item, rows: 100000}\n  - {name: hour, rows: 24}\n"
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return ["--tables", write_yaml(tmp_path, TABLES, "tables.yaml"), *SMALL, "--gpus-per-node", "2"]


def run(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_that_fits(capsys: pytest.CaptureFixture[str], command: list[str], tmp_path: Path) -> None:
    paths = {flag: tmp_path / f"{flag}.out" for flag in ("json", "picture", "save")}
    flags = [part for flag, path in paths.items() for part in (f"--{flag}", str(path))]
    code, out, err = run(capsys, [*command, "--rows", "user=4_000_000", *flags])
    assert (code, err) == (0, "")
    assert "tables on 2x2 a100_80g: fits" in out and "samples/s" in out
    values: dict[str, Any] = json.loads(paths["json"].read_text())
    assert [table["name"] for table in values["tables"]] == ["user", "item", "hour"]
    assert values["tables"][0]["rows"] == 4_000_000
    assert len(values["estimate"]["ranks"]) == 4
    assert values["days"] == pytest.approx(1e9 / values["estimate"]["samples_per_s"] / 86_400)
    assert paths["picture"].read_bytes().startswith(b"\x89PNG")
    assert read_plan(paths["save"]).tables["user"].columns == 32


def test_json_alone(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, [*command, "--json", "-"])
    assert code == 0 and json.loads(out)["fits"] is True


def test_an_impossible_case(capsys: pytest.CaptureFixture[str], command: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    tight = ["--rows", "user=5_000_000_000", "--sharding.types=[table_wise]", "--save", str(saved), "--json", "-"]
    code, out, _ = run(capsys, [*command, *tight])
    values = json.loads(out)
    assert code == 3 and values["fits"] is False and not saved.exists()
    worst = values["overflows"][0]
    assert worst["tables"][0][0] == "user"
    assert worst["missing_bytes"] == -values["estimate"]["ranks"][worst["rank"]]["memory_bytes"]["headroom"]
    remedies = {remedy["name"]: remedy for remedy in values["remedies"]}
    assert remedies["fp16 tables"]["fits"] is False and remedies["fp16 tables"]["missing_bytes"] > 200 * 2**30
    code, out, _ = run(capsys, [*command, *tight[:3]])
    assert code == 3
    assert f"rank {worst['rank']} is {worst['missing_bytes'] / 2**30:.1f} GiB over its memory: user" in out
    assert "--embeddings.dtype=fp16" in out and "GiB missing on the fullest rank" in out
    code, out, _ = run(capsys, [*command, *tight[:3], "--no-remedies"])
    assert code == 3 and "tried" not in out


def test_an_unbalanced_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "tables: [{name: seen, rows: 9000000, kind: list, mean_length: 500}, {name: item, rows: 100000}]\n"
    tables = ["--tables", write_yaml(tmp_path, text), *SMALL, "--nodes", "1", "--sharding.types=[table_wise]"]
    code, out, _ = run(capsys, [*tables, "--train.batch_size=524288"])
    assert code == 4
    assert "warning: unbalanced: rank" in out and "Table seen (table_wise) takes" in out
    assert "What would make it balance" not in out  # nothing but whole tables is allowed
    finer = ["--sharding.types=[table_wise,column_wise]", "--train.batch_size=524288"]
    code, out, _ = run(capsys, [*tables[:-1], *finer])
    assert code == 4 and "columns cut in 2" in out and "columns cut in 4" in out
    values = json.loads(run(capsys, [*tables[:-1], *finer, "--json", "-"])[1])
    waits = [values["estimate"]["waiting_share"], *(remedy["waiting_share"] for remedy in values["remedies"])]
    assert waits == sorted(waits, reverse=True) and waits[2] < 0.5 < 0.7 < waits[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "a100_80gb"], "error: --hardware 'a100_80gb': did you mean 'a100_80g'?"),
        (["--rows", "usr=5"], "error: --rows names 'usr', which is no feature of 'tables'; user is"),
        (["--gpus-per-node", "9"], "error: 9 ranks on one a100_80g host, which has 8; use more nodes"),
        (["--embedings.dim=8"], "error: config: unknown key 'embedings'; did you mean 'embeddings'?"),
        (["--what-if", "2x8,4"], "error: world '4' is not understood"),
        (["--what-if", "2x8", "--save", "x"], "error: --save is for one plan"),
        (["--data", "x"], "error: --tables and --data are two answers"),
        (["--scale-rows", "0"], "error: --scale-rows 0: must be more than 0"),
        (["--sharding.plan=x"], "error: sharding.plan=x names a plan"),
        (["--sharding.per_table={usr: {types: [table_wise]}}"], "error: sharding.per_table names 'usr'"),
        (
            ["--hardware", "cpu", "--sharding.types=[row_wise]"],
            "error: sharding.types: 'row_wise' is not supported on cpu",
        ),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], command: list[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, [*command, *arguments])
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_worlds_side_by_side(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, [*command, "--what-if", "1x2,2x2,4x2", "--json", "-"])
    worlds = json.loads(out)["worlds"]
    assert code == 0
    assert [world["world"] for world in worlds] == ["1x2", "2x2", "4x2"]
    assert {world["batch_size"] for world in worlds} == {4096}
    assert worlds[0]["efficiency"] == 1.0
    for world, ranks in zip(worlds, (2, 4, 8), strict=True):
        rate = world["samples_per_s"]
        assert world["efficiency"] == pytest.approx(rate / ranks / (worlds[0]["samples_per_s"] / 2))
        assert world["days"]["1e+12"] == pytest.approx(1e12 / rate / 86_400)
    code, out, _ = run(capsys, [*command, "--what-if", "1x2,2x2", "--scale-batch"])
    assert code == 0 and "2.05k" in out and "4.10k" in out
    too_large = ["--rows", "user=2_000_000_000", "--what-if", "1x2,8x2", "--json", "-"]
    code, out, _ = run(capsys, [*command, *too_large])
    assert code == 0 and [world["fits"] for world in json.loads(out)["worlds"]] == [False, True]
