"""``ssr-rec COMMAND`` runs the code of the script of that name in ``tools/``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssr_rec import commands

ROOT = Path(__file__).parents[2]


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ssr-rec", *arguments])
    return commands.main()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_has_a_sentence_for_every_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert {"prepare", "train", "compare", "plan", "export", "score", "show"} <= {line.split()[0] for line in lines}
    assert all(len(line.split()) > 3 for line in lines)


def test_a_command_gets_its_arguments_and_its_exit_status_is_returned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ask(monkeypatch, "show", str(tmp_path / "none")) == 2
    assert "no such run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        ask(monkeypatch, "show-data", "--help")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: ssr-rec show-data ")
    assert ask(monkeypatch, "shwo") == 2
    said = capsys.readouterr()
    assert "no command 'shwo'" in said.err and "show" in said.err and not said.out


def test_every_command_is_a_script_of_few_lines() -> None:
    scripts = {}
    for path in (ROOT / "tools").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ssr_rec.commands."):
                scripts[str(node.module).rpartition(".")[2].replace("_", "-")] = path
    assert set(scripts) == set(commands.commands()) - set(commands.ELSEWHERE)
    assert all(len(path.read_text().splitlines()) < 15 for path in scripts.values())


def test_naming_the_commands_imports_none_of_them() -> None:
    code = "import sys; from ssr_rec import commands; commands.main(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_mode_of_progress_is_taken_or_refused_before_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SSR_REC_PROGRESS", "plain")
    assert ask(monkeypatch, "--progress", "json", "show", str(tmp_path / "none")) == 2
    assert os.environ["SSR_REC_PROGRESS"] == "json" and "no such run folder" in capsys.readouterr().err
    assert ask(monkeypatch, "--progress", "loud", "show", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err == "error: SSR_REC_PROGRESS=loud: choose one of auto, plain, json, quiet\n"
