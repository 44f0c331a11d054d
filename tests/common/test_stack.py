"""A wrong torch / torchrec / fbgemm combination is refused with the right one named."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from ssr_rec.common import versions
from ssr_rec.common.versions import check_stack, require_stack

RIGHT = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": None, "fbgemm-gpu-cpu": "1.8.0"}


def test_what_is_installed_is_right():
    check_stack()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fbgemm-gpu": "1.8.1", "fbgemm-gpu-cpu": None},
        {"torch": "2.11.1", "torchrec": "1.6.0", "fbgemm-gpu-cpu": "1.6"},
    ],
)
def test_right_trios(change):
    check_stack(RIGHT | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.12.0"}, r"torch 2\.12\.0 is not supported; install one of torch 2\.13, 2\.11"),
        ({"torch": None}, "torch None is not supported"),
        ({"torchrec": "1.6.0"}, r"torch 2\.13\.0\+cpu needs torchrec 1\.8\.x, found 1\.6\.0"),
        ({"torchrec": None}, r"needs torchrec 1\.8\.x, found None"),
        ({"fbgemm-gpu-cpu": "1.6.0"}, r"needs fbgemm-gpu-cpu 1\.8\.x, found 1\.6\.0"),
        ({"fbgemm-gpu-cpu": None}, r"needs fbgemm-gpu or fbgemm-gpu-cpu 1\.8\.x, found None"),
        ({"fbgemm-gpu": "1.8.0"}, "both installed"),
    ],
)
def test_wrong_trios(change, message):
    with pytest.raises(ValueError, match=message):
        check_stack(RIGHT | change)


def test_the_script_ends_before_torchrec_is_imported():
    script = Path(__file__).parents[2] / "ssr_rec" / "train.py"
    code = (
        "import runpy, sys, ssr_rec.common.versions as s;"
        "found = {'torch': '2.13.0', 'torchrec': '1.6.0', 'fbgemm-gpu': None, 'fbgemm-gpu-cpu': '1.8.0'};"
        "s._installed = lambda: found;"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch 2.13.0 needs torchrec 1.8.x, found 1.6.0; install it with make setup")


def test_what_loading_leaves_is_kept_out_of_the_collector_which_runs_on(monkeypatch):
    monkeypatch.setattr(versions, "_installed", lambda: RIGHT)
    try:
        require_stack("wave")
        assert gc.isenabled() and gc.get_freeze_count() > 10_000
        with pytest.raises(ModuleNotFoundError):
            require_stack("ssr_rec.no_such_module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
