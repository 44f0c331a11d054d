"""The benchmark of sequence encoders on a tiny batch."""

import json

import pytest
import torch

from tools.bench_sequences import draw_lengths, main

SMALL = ["--batch", "12", "--dim", "4", "--rows", "30", "--fields", "2", "--hidden", "8", "--turns", "2"]
SHORT = ["--max-length", "6", "--mean-length", "2", "--warmup", "1"]


def test_every_step_runs_and_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    encoders = ["pool", "din:hidden=[4],activation=dice", "hstu"]
    for event_tables in ("bags", "unpooled"):
        arguments = ["--event-columns", "2", "--event-tables", event_tables, "--encoders", *encoders]
        assert main([*SMALL, *SHORT, *arguments]) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        without, *others = figures["records"]
        assert without["encoder"] is None and [record["encoder"] for record in others] == encoders
        for record in others:
            assert record["step_s"] > 0 and record["alone_s"] > 0 and record["step_ratio"] > 0
            assert record["flops"] > 0 and record["out_fields"] == 2


def test_lengths_have_the_mean_asked_for() -> None:
    torch.manual_seed(0)
    lengths = draw_lengths(1024, 15.0, 50)
    assert lengths.double().mean().item() == pytest.approx(15, abs=0.1)
    assert lengths.min() == 0 and lengths.max() == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoders", "nope"], "--encoders nope: "),
        (["--encoders", "din:hiden=[4]"], "--encoders din:hiden=[4]: din.hiden: Extra inputs"),
        (["--encoders", "hstu:num_heads=3"], "num_heads=3 does not divide"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--mean-length", "7"], "--mean-length 7.0: must be within 0 and --max-length"),
    ],
)
def test_bad_input_is_refused_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
