"""The command line of tools/show_runs.py."""

import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ssr_rec.runs.folder import append_jsonl, write_json

SCRIPT = Path(__file__).parents[2] / "tools" / "show_runs.py"


@pytest.fixture(scope="module")
def show_runs():
    spec = importlib.util.spec_from_file_location("show_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """Two finished runs and one that is not."""
    for name, auc in (("mlp", 0.71), ("ssr_s", 0.72)):
        (tmp_path / name).mkdir()
        report = {
            "name": name,
            "over_arch": {"kind": name.upper(), "num_parameters": 100, "flops_per_sample": 200},
            "test": {"click": {"auc": auc, "logloss": 0.5}},
            "ceiling": {"click": {"auc": 0.76, "logloss": 0.4}},
            "dataset": {"name": "synthetic", "dataset_id": "x"},
        }
        write_json(tmp_path / name / "report.json", report)
        row = {"step": 1, "samples": 10, "split": "validation", "tasks": {"click": {"auc": auc}}}
        append_jsonl(tmp_path / name / "metrics.jsonl", row)
    (tmp_path / "unfinished").mkdir()
    return tmp_path


def test_table_sentence_and_picture(show_runs, runs, capsys):
    assert show_runs.main([str(runs / "mlp"), str(runs / "ssr_s"), "--plot", str(runs / "runs.png")]) == 0
    out = capsys.readouterr().out
    assert "| SSR_S     |    100 |          200 |     .7200 |         .5000 |         - |" in out
    assert out.splitlines()[-1].startswith("SSR_S reaches .7200 click AUC, +.0100 over MLP; that is 84.6 %")
    assert (runs / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, complaint", [("unfinished", "no report.json; the run has not finished"), ("nothing", "no such run folder")]
)
def test_a_missing_or_unfinished_run_is_one_line_and_exit_code_2(show_runs, runs, capsys, name, complaint):
    assert show_runs.main([str(runs / "mlp"), str(runs / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("show_runs: ") and complaint in captured.err


def test_a_picture_that_cannot_be_written_is_one_line_and_exit_code_2(show_runs, runs, capsys):
    assert show_runs.main([str(runs / "mlp"), "--plot", str(runs / "nowhere" / "runs.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


class Page(HTMLParser):
    """What a browser would show and fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_one_page_has_it_all_and_fetches_nothing(show_runs, runs, capsys):
    report = json.loads((runs / "mlp" / "report.json").read_text())
    report |= {"warnings": ["test click: <b>bad</b>"], "seconds": 90.0, "versions": {"torch": "2.13.0"}, "steps": 1234}
    write_json(runs / "mlp" / "report.json", report)
    (runs / "mlp" / "config.yaml").write_text("name: <i>mlp</i>\n")
    (runs / "mlp" / "importance.png").write_bytes(b"\x89PNG of another tool")
    assert show_runs.main([str(runs / "mlp"), str(runs / "ssr_s"), "--html", str(runs / "page.html")]) == 0
    page = Page((runs / "page.html").read_text())
    assert not page.open and not {"b", "i", "script", "link"} & page.tags
    assert {".7100", ".7200", ".7600", "1m30s", "2.13.0", "1,234"} <= set(page.cells)
    # The comparison, the curves of both, and the other picture in the folder.
    assert len(page.fetched) == 4 and all(one.startswith("data:image/png;base64,") for one in page.fetched)
    assert show_runs.main([str(runs / "mlp"), "--html", str(runs / "nowhere" / "page.html")]) == 2
    assert capsys.readouterr().err.startswith("show_runs: ")
