"""tools/bench_serving.py: what is counted, drawn and refused."""

import importlib
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("bench_serving")


class Stalls:
    """A server that refuses every fifth request and stalls once, for .2 s."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}

    def __call__(self, number: int) -> None:
        time.sleep(0.2 if number == 100 else 0.0)
        self.statuses[number] = 429 if number % 5 == 0 else 200


def test_refused_requests_are_apart_and_a_stall_counts_for_all_that_it_delays(bench, tmp_path):
    arrivals = np.arange(600) / 1000
    found = bench.measured(Stalls(), arrivals, 1)
    assert found["requests"] == 480 and found["statuses"] == {"429": 120, "200": 480}
    assert found["latency"]["p90"] > 0.1 and found["latency"]["p50"] < 0.1, "some 200 of them waited, not one"
    common = {"form": "arrow", "batching": "on"}
    records = [
        {**common, "loop": "closed", "load": None, **found},
        *({**common, "loop": "open", "load": x, "asked_per_s": 1000 * x, **found} for x in (0.5, 1.0)),
        {**common, "loop": "open", "load": 2, "asked_per_s": 2e3, "latency": None, "per_second": 0.0, "requests": 0},
    ]
    lines = bench.table(records).splitlines()
    assert len(lines) == 6 and "120x 429" in lines[2] and "n/a" in lines[5]
    bench.draw(records, 200, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forms", "user"], "--forms user: say with --user-columns"),
        (["--picture", "nowhere/p.png"], "there is no folder nowhere"),
        ([], "not an artifact"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, tmp_path, capsys, arguments, message):
    assert bench.main([str(tmp_path), "--data", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
