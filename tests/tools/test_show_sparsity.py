"""The command line of tools/show_sparsity.py on runs with random weights."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.made_run import make_run
from tools.show_sparsity import main


@pytest.mark.parametrize(
    ("over_arch", "views", "columns"),
    [
        (["--over_arch.name=mlp", "--over_arch.hidden=[16]"], 0, {"near_zero", "mass_dims", "power_dims"}),
        (["--over_arch.filter=dynamic", "--over_arch.num_views=3", "--over_arch.view_dim=8"], 2, {"cosine", "overlap"}),
        pytest.param(
            ["--over_arch.filter=static", "--over_arch.num_views=3", "--over_arch.view_dim=8"],
            2,
            {"overlap"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mlp", "dynamic", "static"],
)
def test_table_json_and_picture(dataset: Path, tmp_path: Path, capsys, over_arch, views, columns) -> None:
    run = make_run(tmp_path / "run", dataset, over_arch)
    assert main([str(run), "--plot", str(tmp_path / "it.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[0].startswith("| dense layer" if found["layers"] else "| layer of views")
    assert len(found["views"]) == views
    assert columns <= set((found["views"] or found["layers"])[0])
    assert imread(tmp_path / "it.png").ndim == 3


def test_what_cannot_be_shown_is_one_line(dataset: Path, tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"show_sparsity: {tmp_path}: not a run folder")
    run = make_run(tmp_path / "run", dataset, ["--over_arch.filter=dynamic"])
    assert main([str(run), "--split", "tomorrow"]) == 2
    assert "tomorrow" in capsys.readouterr().err
