"""The progress line, its numbers and its timing."""

import io
import json
import logging
import math
import re
import sys
from types import SimpleNamespace

import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.common.formatting import decimal, duration, short_number
from ssr_rec.common.logs import send_logs
from ssr_rec.runs.progress_line import Progress, format_progress

ROW = {
    "step": 1200,
    "split": "train",
    "samples_per_s": 24_100.0,
    "data_wait": 0.004,
    "loss": 0.51234,
    "tasks": {"click": {"auc": 0.71234}},
}


WITHOUT_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line():
    line = "step 1200/1953  24.1k samples/s  wait 0.4 %  loss .5123  auc .7123  eta 1m32s"
    assert format_progress(ROW, 1953, 92.0) == line


def test_the_line_leaves_out_what_is_not_known_and_names_several_tasks():
    assert format_progress({"step": 3}) == "step 3"
    assert format_progress({"step": 3, "loss": math.nan, "tasks": {}}, 9) == "step 3/9  loss nan"
    two = {"step": 3, "tasks": {"click": {"auc": 0.7}, "like": {"auc": math.nan}}}
    assert format_progress(two) == "step 3  auc click .7000, like -"
    number = {"seconds": {"xauc": 0.6}}
    assert format_progress({"step": 3, "tasks": number}) == "step 3  xauc .6000"
    mixed = {"step": 3, "tasks": {"click": {"auc": 0.7}, **number}}
    assert format_progress(mixed) == "step 3  auc click .7000  xauc seconds .6000"


@pytest.mark.parametrize(
    "value, text", [(0.71236, ".7124"), (1.0417, "1.0417"), (-0.0012, "-.0012"), (10.02, "10.0200"), (None, "-")]
)
def test_decimal(value, text):
    assert decimal(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        *[(0, "0"), (7, "7"), (999, "999"), (999.9, "1.00k"), (1000, "1.00k"), (24_149, "24.1k"), (241_490, "241k")],
        *[(999_700, "1.00M"), (1_570_000, "1.57M"), (2.5e9, "2.50G"), (3e12, "3.00T")],
    ],
)
def test_short_number(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (92, "1m32s"), (7500, "2h05m"), (3 * 86_400 + 4 * 3600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_log_file_gets_a_line_every_so_often_and_the_last():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(100, stream=stream, seconds_between_lines=10.0, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.3
        progress.show({"step": step})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 1/100  eta 30s",
        "step 35/100  eta 20s",
        "step 69/100  eta 9s",
        "step 100/100  eta 0s",
    ]


def screen(written: str) -> list[str]:
    """What a terminal shows of it: lines, the cursor's ways left, up and down, and erased lines; colours aside."""
    lines, row, column = [""], 0, 0
    for code, up, text in re.findall(
        r"(\x1b\[(\d*)[A-Za-z]|\x1b\[\?25[hl]|\r|\n)|([^\x1b\r\n]+)", WITHOUT_COLOURS.sub("", written)
    ):
        if code == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            row -= int(up or 1)
        elif code == "\x1b[2K":
            lines[row] = ""
        elif not text:
            assert code in ("\x1b[?25h", "\x1b[?25l"), repr(code)
        lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :] if text else lines[row]
        column += len(text)
    return [line.rstrip() for line in lines]


def test_a_terminal_gets_one_line_rewritten_and_notes_that_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    progress = Progress(1953, stream=stream)
    progress.show({"step": 1})
    progress.show(ROW)
    assert len(screen(stream.getvalue())) == 1
    progress.note("validation [red]auc[/] a:on:b, " + "a line of any length " * 3)
    progress.show({"step": 1201, "loss": 0.5})
    print("from elsewhere")
    progress.close()
    progress.close()
    progress.note("done")
    bar = "━" * 12 + "╺" + "━" * 7
    assert screen(stream.getvalue()) == [
        "validation [red]auc[/] a:on:b, " + "a line of any length " * 2 + "a line of any length",
        "from elsewhere",
        f"{bar} step 1201/1953  loss .5000  eta 0s",
        "done",
        "",
    ]
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("has_no_isatty", [False, True])
def test_what_is_printed_to_a_file_meanwhile_is_in_the_file(monkeypatch, has_no_isatty):
    stream, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=file.write) if has_no_isatty else file)
    progress = Progress(10, stream=stream, clock=lambda: 0.0)
    progress.show({"step": 1})
    print("a result")
    print("a warning", file=sys.stderr)
    progress.close()
    assert file.getvalue() == "a result\n"
    assert [line.lstrip("━╺ ") for line in screen(stream.getvalue())] == ["a warning", "step 1/10  eta 0s", ""]


def test_a_line_longer_than_the_terminal_stays_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress(None, stream=stream)
    progress.show(ROW)
    progress.show(ROW)
    progress.close()
    (line, rest) = screen(stream.getvalue())
    assert rest == "" and len(line) <= 40 and line.endswith("…") and "step 1200  24" in line


def test_a_resumed_run_counts_its_own_steps_for_the_eta():
    now = [50.0]
    stream = io.StringIO()
    progress = Progress(200, first_step=100, stream=stream, clock=lambda: now[0])
    now[0] += 5
    progress.show({"step": 150})
    assert stream.getvalue() == "step 150/200  eta 5s\n"


def test_other_ranks_are_silent():
    stream = Terminal()
    progress = Progress(10, rank=1, stream=stream)
    progress.show({"step": 10})
    progress.note("done")
    progress.close()
    assert stream.getvalue() == ""


def shown(mode, monkeypatch):
    """What a terminal gets of a step, an evaluation, an information and a warning."""
    monkeypatch.setenv("SSR_REC_PROGRESS", mode)
    stream = Terminal()
    progress = Progress(total_steps=1953, stream=stream)
    send_logs(progress.note, progress.warn)
    try:
        progress.show({**ROW, "data_wait": math.nan})
        progress.note("validation at step 1200", {"step": 1200, "split": "validation", "loss": math.nan})
        logging.getLogger("ssr_rec.some").info("by the way")
        logging.getLogger("ssr_rec.some").warning("take care")
    finally:
        send_logs(None)
    progress.close()
    return stream.getvalue()


def test_each_mode_says_what_it_is_for(monkeypatch):
    said = [line.lstrip("━╺ ").split("  ")[0] for line in screen(shown("auto", monkeypatch))]
    assert said == ["validation at step 1200", "by the way", "take care", "step 1200/1953", ""]
    for name, value in (("TERM", "dumb"), ("TTY_INTERACTIVE", "0"), ("TTY_COMPATIBLE", "0"), ("FORCE_COLOR", "")):
        with monkeypatch.context() as denied:
            denied.setenv(name, value)
            assert shown("auto", denied) == shown("plain", denied)
    plain = shown("plain", monkeypatch).splitlines()
    assert plain[0].startswith("step 1200/1953  24.1k") and plain[1:] == [
        *("validation at step 1200", "by the way", "take care")
    ]
    step, validation, *notes = [json.loads(line) for line in shown("json", monkeypatch).splitlines()]
    assert (step["step"], step["steps"], step["tasks"], step["data_wait"]) == (1200, 1953, ROW["tasks"], None)
    assert validation == {"step": 1200, "split": "validation", "loss": None}
    assert notes == [{"message": "by the way"}, {"message": "take care"}]
    assert shown("quiet", monkeypatch) == "take care\n"
    with pytest.raises(UserError, match="SSR_REC_PROGRESS=loud: choose one of auto, plain, json, quiet"):
        shown("loud", monkeypatch)
