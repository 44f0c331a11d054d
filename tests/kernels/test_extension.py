"""Building the C++ operators once, whoever comes, and what happens where they cannot be built."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ssr_rec.kernels import extension, ics
from ssr_rec.kernels.reference import ics_reference
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
    assert {path.suffix for path in first.parent.iterdir()} == {".so", ".sha256", ".lock"}


@needs_compiler
def test_another_environment_with_the_same_torch_finds_it(workshop, monkeypatch) -> None:
    first = extension.build()
    other = workshop / "other" / "torch"
    other.parent.mkdir()
    other.symlink_to(Path(torch.__file__).parent)
    monkeypatch.setattr(torch, "__file__", str(other / "__init__.py"))
    assert extension.build() == first and calls(workshop) == 2


@needs_compiler
def test_what_is_built_needs_no_compiler(workshop, monkeypatch) -> None:
    first = extension.build()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    assert extension.build() == first


@needs_compiler
@pytest.mark.parametrize("left", [0, 1000])
def test_a_truncated_library_is_built_again(workshop, monkeypatch, left) -> None:
    library = extension.build()
    whole = library.read_bytes()
    library.write_bytes(whole[:left])
    assert extension.build() == library and library.read_bytes()[:4] == whole[:4] and calls(workshop) == 4
    library.write_bytes(whole[:left])
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(extension.BuildError, match="no C\\+\\+ compiler"):
        extension.build()


@needs_compiler
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("echo No space left on device && exit 1", "No space left"),
        # A stop of the whole job; the compiler says nothing. Not SIGTERM, which a test before may have left ignored.
        ("kill -KILL $$", "Killed by signal 9"),
        ("exit 143", "Killed by signal 15"),
    ],
)
def test_trouble_of_the_moment_passes(workshop, trouble, message) -> None:
    compiler, now = workshop / "compiler", workshop / "now"
    now.touch()
    compiler.write_text(f'#!/bin/sh\n[ "$1" != --version ] && [ -e {now} ] && {trouble}\nexec c++ "$@"\n')
    with pytest.raises(extension.BuildError, match=f"the next process tries again: {message}"):
        extension.build()
    now.unlink()
    assert extension.build().is_file()


@needs_compiler
def test_a_home_that_cannot_be_written_leaves_the_temporary_folder(workshop, monkeypatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    (workshop / "home").write_text("a file, in which nothing can be made")
    monkeypatch.setenv("HOME", str(workshop / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(workshop))
    library = extension.build()
    assert library.parent == workshop / f"ssr_rec-{os.getuid()}" and library.parent.stat().st_mode & 0o777 == 0o700
    library.parent.chmod(0o777)  # then anybody may have put it there
    with pytest.raises(extension.BuildError, match="no folder to build in"):
        extension.build()


@pytest.mark.slow
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


def test_a_user_without_a_folder_is_told_what_to_set(workshop, tmp_path, monkeypatch) -> None:
    def nobody(user: int) -> None:
        raise KeyError(user)

    for name in ("TORCH_EXTENSIONS_DIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "compiler"))
    with pytest.warns(RuntimeWarning, match="plain, slower operators: .* set TORCH_EXTENSIONS_DIR"):
        assert not extension._load.__wrapped__()
