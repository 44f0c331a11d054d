"""docs/tutorial.md, as a newcomer follows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|yaml|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(tmp_path):
    for name in ("tools", "ssr_rec", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    said = ""
    for kind, text in BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text()):
        if kind != "bash":
            (tmp_path / text.split()[1]).write_text(text)  # the first line is a comment with the name
            continue
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        said += done.stdout
    aucs = [float(auc) for auc in re.findall(r"test click: AUC (\.\d+)", said)]
    assert len(aucs) == 2 and min(aucs) > 0.6, aucs
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert scores.num_rows == 1000 and scores.column_names == ["user_id", "item_id", "p_click"]
