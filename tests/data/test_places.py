"""Logs and datasets in an object store: fsspec's memory, which no local path reaches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ssr_rec.common.paths import is_local, place
from ssr_rec.data.preparation.prepare import prepare
from ssr_rec.data.reader import Reader
from ssr_rec.data.schema import Schema
from tests.cases import one_quick
from tests.prepare_log import make_rows, spec_with, write_csv, write_parquet
from tools.prepare_data import main

pytest.importorskip("upath", reason="universal_pathlib is not installed")
BUCKET = "memory://bucket"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The objects of the store, in the order in which they were written."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield MemoryFileSystem.store
    # A URL that was taken for a path would be a folder here.
    assert list(empty.iterdir()) == []
    MemoryFileSystem.store.clear()


def put(path: Path, name: str) -> str:
    place(f"{BUCKET}/{name}").parent.mkdir(parents=True, exist_ok=True)
    place(f"{BUCKET}/{name}").write_bytes(path.read_bytes())
    return f"{BUCKET}/{name}"


def logs(tmp_path: Path) -> list[Path]:
    rows = make_rows(1500)
    return [
        write_csv(rows[:500], tmp_path / "a.csv"),
        write_csv(rows[500:900], tmp_path / "b.csv.gz"),
        write_csv(rows[900:], tmp_path / "c.csv"),
    ]


@pytest.mark.parametrize("inputs", one_quick(["l*/?.c*"], ["logs/a.csv", "logs/b.csv.gz", "logs/c.csv"], ["logs"]))
def test_a_dataset_is_the_same_wherever_it_and_its_log_are(tmp_path: Path, store: Any, inputs: list[str]) -> None:
    files = logs(tmp_path)
    for path in files:
        put(path, f"logs/{path.name}")
    here = prepare([str(path) for path in files], tmp_path / "out", spec_with())
    there = prepare([f"{BUCKET}/{name}" for name in inputs], place(f"{BUCKET}/data/out"), spec_with())
    assert there == here == Schema.read(f"{BUCKET}/data/out")
    written = {name.removeprefix("/bucket/data/out/"): value for name, value in store.items() if "/data/" in name}
    local = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert sorted(written) == sorted(local)
    for name, path in local.items():
        assert written[name].getvalue() == path.read_bytes()
    # Whoever finds it finds all that it names.
    assert list(written)[-1] == "schema.json"


def test_parquet_from_a_store_and_training_rows_from_it(tmp_path: Path, store: Any) -> None:
    log = put(write_parquet(make_rows(1500), tmp_path / "log.parquet"), "log.parquet")
    here, there = tmp_path / "out", place(f"{BUCKET}/out")
    schema = prepare([log], here, spec_with())
    prepare([log], there, spec_with())
    readers = [Reader(folder, schema, "train", 100, seed=3) for folder in (here, there)]
    for own, other in zip(*(reader.epoch(1, 2) for reader in readers), strict=True):
        assert torch.equal(own.sparse.values(), other.sparse.values())
        assert torch.equal(own.labels, other.labels)


def test_damage_in_a_store_shows(tmp_path: Path, store: Any) -> None:
    log = put(write_parquet(make_rows(1500), tmp_path / "log.parquet"), "log.parquet")
    folder = place(f"{BUCKET}/out")
    schema = prepare([log], folder, spec_with())
    shard = folder / schema.splits["train"].shards[0].path
    whole = shard.read_bytes()
    for position, message in ((len(whole) - 40, "damaged, or not the file"), (len(whole) // 3, "is damaged")):
        broken = bytearray(whole)
        broken[position] ^= 1
        shard.write_bytes(bytes(broken))
        with pytest.raises(ValueError, match=f"{BUCKET}/out/train/00000.parquet: .*{message}"):
            list(Reader(folder, schema, "train", 100).epoch(0))
    shard.unlink()
    with pytest.raises(ValueError, match="no such shard"):
        Reader(folder, schema, "train", 100)


def test_what_fails_leaves_nothing_and_what_is_there_stays(tmp_path: Path, store: Any) -> None:
    rows = make_rows(300)
    rows[41]["click"] = 2
    log = put(write_csv(rows, tmp_path / "log.csv"), "log.csv")
    with pytest.raises(ValueError, match=f"{BUCKET}/log.csv: row 42: column 'click' is 2.0"):
        prepare([log], place(f"{BUCKET}/out"), spec_with())
    assert list(store) == ["/bucket/log.csv"]
    put(tmp_path / "log.csv", "out/precious")
    with pytest.raises(ValueError, match=f"{BUCKET}/out: exists and is not empty"):
        prepare([log], place(f"{BUCKET}/out"), spec_with())
    assert list(store) == ["/bucket/log.csv", "/bucket/out/precious"]


def test_nothing_half_written_stays(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = put(write_csv(make_rows(300), tmp_path / "log.csv"), "log.csv")

    def fail(*_: Any) -> None:
        raise OSError("the store is gone")

    monkeypatch.setattr(Schema, "write", fail)
    with pytest.raises(OSError, match="the store is gone"):
        prepare([log], place(f"{BUCKET}/out"), spec_with())
    assert list(store) == ["/bucket/log.csv"]


def test_the_command_line_takes_urls(tmp_path: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    log = put(write_csv(make_rows(400), tmp_path / "log.csv"), "log.csv")
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: toy, labels: [click], categorical: [user], ignore: [city, price, day, tags, uid]}")
    command = ["table", "--spec", str(spec), "--input"]
    assert main([*command, log, "--output", f"{BUCKET}/out"]) == 0
    assert "/bucket/out/schema.json" in store
    capsys.readouterr()
    for arguments, message in (
        ([f"{BUCKET}/none.csv", "--output", f"{BUCKET}/no"], f"{BUCKET}/none.csv: no such file"),
        ([f"{BUCKET}/n*", "--output", f"{BUCKET}/no"], "no such file"),
        ([log, "--output", "zzz://bucket/no"], "zzz://bucket/no: cannot be reached"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["table", "--input", log, "--add-to", f"{BUCKET}/out"]) == 2
    assert "local or mounted disk alone" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://bucket/data: Install s3fs to access S3; with pip") as raised:
        Schema.read("s3://bucket/data")
    assert "\n" not in str(raised.value)


def test_plain_paths_stay_paths() -> None:
    assert place("data/x") == Path("data/x")
    assert is_local(place("data/x"))
    assert not is_local(place(f"{BUCKET}/x"))
