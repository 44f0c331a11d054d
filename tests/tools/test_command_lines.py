"""Every tool starts as a user starts it: ``python tools/NAME.py``, from anywhere, with nothing set beforehand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

# In one process, as what all of them import takes seconds.
ASK_ALL = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import ssr_rec, launch
del sys.path[0]
for path in sys.argv[1:]:
    sys.argv[1:] = ["-h"]
    print("==", path, flush=True)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print("==", path, end.code)
"""


@pytest.mark.slow
def test_every_tool_explains_itself(tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(TOOLS.glob("*.py")) if '__name__ == "__main__"' in path.read_text()]
    # They run in another environment.
    paths = [path for path in paths if not path.endswith(("fuxictr_child.py", "fuxictr_prepare.py"))]
    # A script's folder comes first in its path; of the repository's root only the installed packages are found.
    environment = {**os.environ, "PYTHONPATH": str(TOOLS)}
    command = [sys.executable, "-c", ASK_ALL, str(TOOLS.parent), *paths]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(paths) > 10
    for path in paths:
        assert f"== {path} 0\n" in done.stdout
        assert done.stdout.split(f"== {path}\n")[1].startswith("usage: ")
