"""Sizes beyond which a reader loses his way: of files, functions, parameter lists and the package's top level."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_ROOMS, MAX_TRAIN = 350, 60, 7, 20, 120
FILES = sorted(path for folder in ("ssr_rec", "tools", "launch") for path in (ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def has_free_parameters(path: Path) -> bool:
    """Kernels take what their operators take; a TorchX component's parameters are its command line."""
    return "kernels" in path.parts or path.parent.name == "launch"


def is_of_scikit_learn(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """scikit-learn reads an estimator's parameters off its constructor, which can therefore not bundle them."""
    return path.parent.name == "estimator" and function.name == "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE, f"{path}: {lines} lines, the limit is {MAX_FILE}"
    for function in functions(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{path}: {function.name} has {length} lines, the limit is {MAX_FUNCTION}"
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if not has_free_parameters(path) and not is_of_scikit_learn(path, function):
            assert count <= MAX_PARAMETERS, f"{path}: {function.name} has {count} parameters"


def test_the_top_level_the_command_and_the_readme_are_small() -> None:
    rooms = [
        path.name for path in (ROOT / "ssr_rec").iterdir() if path.name[0] not in "._" or path.name == "__init__.py"
    ]
    assert len(rooms) <= MAX_ROOMS, rooms
    assert len((ROOT / "ssr_rec" / "train.py").read_text().splitlines()) < MAX_TRAIN
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
