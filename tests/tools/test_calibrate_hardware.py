"""tools/calibrate_hardware.py: a file that the planner reads, with what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssr_rec.planning.hardware import load_hardware
from tools import calibrate_hardware
from tools.calibrate_hardware import hardware_values, main, timer

SMALL = ["--device", "cpu", "--megabytes", "1", "--rows", "16", "--repetitions", "1"]


def test_the_file_is_a_hardware_file_of_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert main([*SMALL, "--out", str(path)]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["measured"]
    mine, base = load_hardware(str(path)), load_hardware("cpu")
    assert mine.memory_gb_s == pytest.approx(measured["memory_gb_s"], abs=0.06)
    assert mine.gemm_flops("fp32", 1) == pytest.approx(measured["fp32_tflops"] * 1e12, abs=6e7)
    assert mine.assumptions.lookup_ns is not None
    assert mine.assumptions.lookup_ns.id == measured["lookup_id_ns"]
    assert (mine.network_gbit_s, mine.memory_gib) == (base.network_gbit_s, base.memory_gib)


def test_lookups_are_timed_by_what_they_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that takes 100 ns a bag, 40 an id and half a nanosecond a byte is found out."""
    counts = iter([(1, 16), (1, 64), (10, 16), (10, 64)])
    monkeypatch.setattr(calibrate_hardware, "LOOKUP_TABLES", 2)
    monkeypatch.setattr(calibrate_hardware, "LOOKUP_BATCH", 8)

    def seconds(call: Callable[[], Any]) -> float:
        call()
        length, dim = next(counts)
        return 16 * (100 + length * 40 + (length + 1) * dim * 4 * 0.5) * 1e-9

    costs = calibrate_hardware.lookup_costs(seconds)
    assert costs == pytest.approx({"lookup_bag_ns": 100, "lookup_id_ns": 40, "lookup_byte_ns": 0.5})


def test_the_median_call_is_timed() -> None:
    calls = []
    seconds = timer(torch.device("cpu"), 3)(lambda: calls.append(torch.ones(10)))
    assert len(calls) == 5 and 0 < seconds < 0.1


def test_a_gpu_has_its_link_and_memory_too() -> None:
    found = {"device": "a GPU", "memory_gb_s": 2000.0, "memory_gib": 79.1, "host_link_gb_s": 25.0, "kernel_us": 5.0}
    found |= {"fp32_tflops": 15.0, "tf32_tflops": 80.0, "bf16_tflops": 150.0}
    values = hardware_values(found, "a100_80g")
    assert values["peak_tflops"] == {"fp32": 15.0, "tf32": 80.0, "bf16": 150.0}
    assert set(values["assumptions"]["gemm_utilisation"].values()) == {1.0}
    assert (values["memory_gib"], values["host_link_gb_s"]) == (79.1, 25.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "a100_80g"], "--base a100_80g is of cuda, the device is cpu"),
        (["--base", "a100"], "Presets: "),
        (["--rows", "0"], "--rows 0: give 1 or more"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
