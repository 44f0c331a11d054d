"""The folder from which a program is loaded goes, also that of a killed process, but never a living one's."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
import zipfile

import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.serving import program
from ssr_rec.serving.program import PREFIX, load_program, make_unloadable


def left_folder(where, name, seconds_ago):
    folder = where / f"{PREFIX}{name}"
    (folder / "model").mkdir(parents=True)
    os.utime(folder, times=(time.time() - seconds_ago,) * 2)
    return folder


def test_what_killed_processes_left_goes_and_what_living_ones_use_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = left_folder(tmp_path, "killed", 3600)
    living, new = left_folder(tmp_path, "living", 3600), left_folder(tmp_path, "new", 1)
    other = tmp_path / "aotinductor_x"
    other.mkdir()
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with program._folder_of_this_process() as own:
        assert not killed.exists() and {*tmp_path.iterdir()} == {living, new, other, own}
        program._remove_left_ones()
        assert own.exists(), "its process lives"
    os.close(lock)
    assert {*tmp_path.iterdir()} == {living, new, other}
    program._remove_left_ones()
    assert {*tmp_path.iterdir()} == {new, other}


def test_a_file_that_is_no_program_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = tmp_path / "model.pt2"
    path.write_bytes(b"half")
    with pytest.raises(UserError, match=r"model\.pt2: damaged: .*; export the run again"):
        load_program(path, 1)
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("model/data/weights", b"")
    with pytest.raises(UserError, match=r"model\.pt2: damaged"):
        load_program(path, 1)
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("readelf")), reason="g++ makes the library")
def test_unique_symbols_become_weak_and_what_is_no_whole_library_stays_as_it_is(tmp_path):
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text("template <class T> T &one() { static T value; return value; } int f() { return one<int>()++; }")
    subprocess.run(["g++", "-shared", "-fPIC", "-fno-gnu-unique", source, "-o", tmp_path / "weak.so"], check=True)
    subprocess.run(["g++", "-shared", "-fPIC", "-fgnu-unique", source, "-o", library], check=True)

    def bindings(path):
        listed = subprocess.run(["readelf", "-W", "--dyn-syms", path], check=True, capture_output=True, text=True)
        return sorted((line.split()[7], line.split()[4]) for line in listed.stdout.splitlines() if "value" in line)

    whole = library.read_bytes()
    assert {binding for _, binding in bindings(library)} == {"UNIQUE"}
    no_sections = bytearray(whole)
    no_sections[0x28:0x30], no_sections[0x3A:0x40] = bytes(8), bytes(6)
    of_32_bits = b"\x7fELF\x01\x01" + whole[6:]
    for odd in (no_sections, of_32_bits, whole[:-1], whole[:100], whole[:20], b""):
        library.write_bytes(odd)
        make_unloadable(library)
        assert library.read_bytes() == odd
    library.write_bytes(whole)
    make_unloadable(library)
    assert bindings(library) == bindings(tmp_path / "weak.so")
    changed = sum(one != other for one, other in zip(whole, library.read_bytes(), strict=True))
    assert changed == len(bindings(library)) > 0
