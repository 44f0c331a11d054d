"""The cost of checkpoints: three kinds of turns, their medians and the share that follows from them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("bench_checkpoints", TOOLS / "bench_checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_turns_and_shares(bench, dataset, monkeypatch, capsys):
    arguments = ["--data", str(dataset), "--steps", "5", "--turns", "3", "--every", "10"]
    arguments += ["--train.batch_size=64", "--over_arch.num_views=2", "--over_arch.view_dim=8", "--embeddings.dim=8"]
    monkeypatch.setattr(sys, "argv", ["bench_checkpoints.py", *arguments])
    assert bench.main() == 0
    lines = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(lines[-1])
    assert sum(line.startswith("turn ") for line in lines) == 4
    for mode in ("background", "foreground"):
        extra = figures["turn_s"][mode] - figures["turn_s"]["none"]
        assert figures["share_of_throughput"][mode] == pytest.approx(extra / 10, abs=2e-4)
        low, high = figures["spread_s"][mode]
        assert low <= figures["turn_s"][mode] <= high and figures["training_waits_s"][mode] < high
    assert figures["checkpoint_mib"] > 0


def test_bad_data_is_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_checkpoints.py", "--data", "nowhere"])
    assert bench.main() == 2
    assert capsys.readouterr().err.startswith("error: nowhere/schema.json: no such file")
