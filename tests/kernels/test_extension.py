"""Building the C++ operators once, whoever comes, and what happens where they cannot be built."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ssr_rec.kernels import extension, ics, ics_reference
from tests.kernels.plain_loops import needs_compiler

UNIT = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A cache of its own, a unit that compiles in no time, and a compiler that counts its calls."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "unit.cpp").write_text(UNIT)
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo call >> {tmp_path}/calls\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(extension, "SOURCES", sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path


def calls(workshop: Path) -> int:
    path = workshop / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


@needs_compiler
def test_is_built_once_and_again_when_a_source_changes(workshop) -> None:
    first = extension.build()
    assert first.is_file() and calls(workshop) == 2  # one unit, one link
    assert extension.build() == first and calls(workshop) == 2
    (workshop / "sources" / "unit.cpp").write_text(UNIT.replace("42", "43"))
    assert extension.build() != first and calls(workshop) == 4
    assert {path.suffix for path in first.parent.iterdir()} == {".so", ".lock"}


@needs_compiler
def test_processes_that_come_together_build_once(workshop) -> None:
    code = (
        "import sys; from pathlib import Path; from ssr_rec.kernels import extension;"
        "extension.SOURCES = Path(sys.argv[1]); print(extension.build())"
    )
    command = [sys.executable, "-c", code, str(workshop / "sources")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    built = {process.communicate()[0].strip() for process in running}
    assert len(built) == 1 and Path(built.pop()).is_file()
    assert calls(workshop) == 2


@needs_compiler
def test_a_failure_is_kept_and_not_repeated(workshop) -> None:
    (workshop / "sources" / "unit.cpp").write_text("this is no C++\n")
    for _ in range(2):
        with pytest.raises(extension.BuildError, match=r"the compiler failed; .*\.log has its output"):
            extension.build()
        assert calls(workshop) == 1
    (log,) = (workshop / "cache").rglob("*.log")
    assert "error" in log.read_text()
    assert not list((workshop / "cache").rglob("*.so"))


def test_without_a_compiler_one_warning_and_the_plain_form(workshop, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(extension, "load", extension._load.__wrapped__)
    z, alpha = torch.randn(4, 2, 8), torch.full((2, 3), 0.1)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler '/nowhere/c\\+\\+': install one, or set CXX"):
        y = ics(z, alpha, None)
    assert torch.equal(y, ics_reference(z, alpha, None))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ics(z, alpha, None), y)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch) -> None:
    def nobody(user: int) -> None:
        raise KeyError(user)

    for name in ("TORCH_EXTENSIONS_DIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.warns(RuntimeWarning, match="plain, slower operators: .* set TORCH_EXTENSIONS_DIR"):
        assert not extension._load.__wrapped__()


def test_importing_the_package_builds_nothing(tmp_path) -> None:
    code = "import ssr_rec.over_archs, ssr_rec.kernels"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_operators_on_a_processor_with_fewer_instructions(tmp_path, capability) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    tests = [str(Path(__file__).with_name(name)) for name in ("test_ics_fast.py", "test_view_fusion.py")]
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], env=environment, capture_output=True)
    assert result.returncode == 0, result.stdout.decode()[-3000:]
    assert list(tmp_path.rglob("*.so"))
