"""The notebooks in ``examples/`` run from top to bottom, and show what they promise."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PICTURES = {"quickstart": 2, "own_log": 2, "sequences": 2, "compare_and_explain": 3}


def test_every_example_is_known():
    assert {path.stem for path in EXAMPLES} == set(PICTURES)
    assert all(path.read_text().startswith("# %% [markdown]\n# # ") for path in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """As a notebook where there is what runs one (the extra ``notebooks``), else as the script that it is, too."""
    if any(find_spec(name) is None for name in ("jupytext", "nbclient", "ipykernel")):
        environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(path)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
    if folder := os.environ.get("EXECUTED"):
        nbformat.write(notebook, Path(folder) / f"{path.stem}.ipynb")
