"""The benchmark of tables, on small ones."""

import json

import pytest

from tools.bench_tables import main

SMALL = ["--rows", "3", "500", "--tables", "2", "--dim", "4", "--batch", "16", "--turns", "1"]


def test_every_form_is_timed_beside_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    *table, last = capsys.readouterr().out.splitlines()
    cases = json.loads(last)["cases"]
    assert [case["rows"] for case in cases] == [3, 500] and cases[0]["distinct"] < cases[1]["distinct"]
    for case in cases:
        assert {"gather", "lookup int32", "update our lazy_adam", "write 2"} <= set(case["ns"])
        assert all(ns > 0 for ns in case["ns"].values())
    assert len(table) == 9 and "update our rowwise_adagrad" in table[5]


@pytest.mark.parametrize("wrong", [["--dim", "6"], ["--batch", "0"], ["--rows", "9", "0"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *wrong]) == 2
    assert f"error: {wrong[0]}=" in capsys.readouterr().err
