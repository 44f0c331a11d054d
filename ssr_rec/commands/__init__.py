"""Runs the commands: ``ssr-rec COMMAND ...``, each also a script in ``tools/``.

A module here is a command of its name: ``main(arguments)`` returns the exit status, and ``command()`` runs the command
line of the process.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ssr_rec.common.errors import UserError
from ssr_rec.common.saying import MODES, VARIABLE, progress_mode

ELSEWHERE = {"train": Path(__file__).parents[1] / "train.py"}
"""Commands whose modules lie in other places of the package."""


def main() -> int:
    """Run the command that the process was asked for; return its exit status, 2 where there is none of that name."""
    modules = commands()
    if sys.argv[1:2] == ["--progress"]:
        os.environ[VARIABLE] = sys.argv[2] if len(sys.argv) > 2 else ""
        del sys.argv[1:3]
    try:
        progress_mode()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in modules:
        # What a command's own help and messages call it.
        sys.argv = [f"{Path(sys.argv[0]).name} {name}", *sys.argv[2:]]
        return _found(modules[name])()
    is_help = name in ("-h", "--help")
    lines = [] if is_help else [f"error: no command {name!r}"]
    lines += ["usage: ssr-rec [--progress MODE] COMMAND [ARGUMENTS]; ssr-rec COMMAND --help explains one", ""]
    lines += [f"  {command:<13} {_first_sentence(path)}" for command, path in modules.items()]
    lines += ["", "modes of progress, also by SSR_REC_PROGRESS=MODE:", ""]
    lines += [f"  {mode:<13} {meaning}" for mode, meaning in MODES.items()]
    # In one write: a reader such as head may leave after the first line.
    (sys.stdout if is_help else sys.stderr).write("\n".join(lines) + "\n")
    return 0 if is_help else 2


def commands() -> dict[str, Path]:
    """Return name -> module of every command, by name."""
    here = {path.stem.replace("_", "-"): path for path in Path(__file__).parent.glob("[a-z]*.py")}
    return dict(sorted({**here, **ELSEWHERE}.items()))


def _found(path: Path) -> Callable[[], int]:
    """Return what runs a command."""
    if path in ELSEWHERE.values():
        found: Callable[[], int] = import_module(f"ssr_rec.{path.stem}").main
        return found
    return import_module(f"{__name__}.{path.stem}").command


def _first_sentence(path: Path) -> str:
    """Return the start of a module's docstring, read and not imported, as some imports take seconds."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n\n")[0].split("``")[0].replace("\n", " ").rstrip(" :").split("; see")[0]
