"""What a delta makes of the older artifact is the newer one to the bit, or nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssr_rec.common.errors import UserError
from ssr_rec.data.schema import Schema
from ssr_rec.serving import delta
from ssr_rec.serving.artifact import MODEL_FILE, Machine, Parity, digest_of, read_manifest, write_manifest
from ssr_rec.serving.delta import apply_delta, make_delta


def make_artifact(folder: Path, dataset: Path, table: np.ndarray, program: bytes, extra: str | None = None) -> Path:
    """An artifact whose program is no program."""
    (folder / "tables").mkdir(parents=True)
    np.save(folder / "tables" / "main-4.npy", table)
    np.save(folder / "tables" / "extra-2.npy", np.zeros((3, 2), np.float16))
    (folder / MODEL_FILE).write_bytes(program)
    if extra is not None:
        (folder / "vocabularies").mkdir()
        (folder / "vocabularies" / f"{extra}.txt").write_text(extra)
    parity = Parity(
        split="test", rows=0, max_difference=0, mean_difference=0, max_logit_difference=0, tolerance=len(program)
    )
    values = {
        "dataset": Schema.read(dataset),
        "tables": "fp32",
        "dense": "fp32",
        "pooling": "mean",
        "over_arch": {},
        "stacks": {"main-4": "tables/main-4.npy", "extra-2": "tables/extra-2.npy"},
        "parity": parity,
        "measures": {},
        "source": {},
        "compiled_for": Machine.here(),
    }
    write_manifest(folder, values)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def pair(tmp_path: Path, dataset: Path) -> tuple[Path, Path]:
    """Two artifacts of 1,000 rows: three rows, the program and a file differ; a zero is negative in one of the rows."""
    table = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    table[7, 2], table[8] = 0.0, np.nan
    older = make_artifact(tmp_path / "older", dataset, table, b"old", "monday")
    table[[3, 999]] += 1
    table[7, 2] = -0.0
    return older, make_artifact(tmp_path / "newer", dataset, table, b"newer", "tuesday")


def test_a_delta_makes_the_newer_artifact_at_the_older_ones_place(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    older, newer = pair
    report = make_delta(older, newer, tmp_path / "delta")
    assert report["rows"] == 3 and report["bytes"] < report["of"]
    wanted, before = contents(newer), contents(older)
    assert apply_delta(older, tmp_path / "delta", tmp_path / "elsewhere") == read_manifest(newer)
    assert contents(tmp_path / "elsewhere") == wanted and contents(older) == before
    mapped = np.load(older / "tables" / "main-4.npy", mmap_mode="r")
    apply_delta(older, tmp_path / "delta", older)
    assert contents(older) == wanted and mapped[3, 0] != np.load(older / "tables" / "main-4.npy")[3, 0]


def test_what_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, pair: tuple[Path, Path], dataset: Path
) -> None:
    older, newer = pair
    made = tmp_path / "delta"
    make_delta(older, newer, made)
    before = contents(newer)
    with pytest.raises(ValueError, match="it changes another artifact than"):
        apply_delta(newer, made, newer)
    with pytest.raises(ValueError, match="already there"):
        make_delta(older, newer, made)
    other = make_artifact(tmp_path / "other", dataset, np.zeros((900, 4), np.float32), b"x")
    with pytest.raises(ValueError, match=r"float32 of \(900, 4\).*deploy the whole artifact"):
        make_delta(older, other, tmp_path / "none")
    for name, text, message in [
        ("delta/main-4.values.npy", b"x", "main-4.values.npy: missing or damaged"),
        (MODEL_FILE, None, "model.pt2: missing or damaged"),
        ("delta.json", b"{}", "damaged: its contents do not have its checksum"),
        ("delta.json", None, "not a delta"),
    ]:
        broken = tmp_path / "broken"
        shutil.copytree(made, broken, dirs_exist_ok=True)
        (broken / name).unlink() if text is None else (broken / name).write_bytes(text)
        with pytest.raises(ValueError, match=message):
            apply_delta(older, broken, older)
    table = older / "tables" / "main-4.npy"
    whole = table.read_bytes()
    table.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    for damage, message in [
        (lambda: None, r"older/tables/main-4.npy: damaged: it is not the file .*deploy the whole newer artifact"),
        (lambda: table.write_bytes(b"x"), r"older/tables/main-4.npy: damaged: "),
        (table.unlink, r"older/tables/main-4.npy: damaged: missing"),
        ((older / "tables" / "extra-2.npy").unlink, r"older/tables/(main-4|extra-2).npy: damaged: missing"),
    ]:
        damage()
        with pytest.raises(UserError, match=message):
            apply_delta(older, made, tmp_path / "out")
    found = json.loads((made / "delta.json").read_text())
    del found["sha256"], found["manifest"]["files"]
    (made / "delta.json").write_text(json.dumps({**found, "sha256": digest_of(found)}))
    with pytest.raises(UserError, match=r"delta.json: no manifest in it: files"):
        apply_delta(older, made, tmp_path / "out")
    assert contents(newer) == before
    assert {path.name for path in tmp_path.iterdir()} == {"older", "newer", "delta", "other", "broken"}


def test_two_deltas_made_at_once_to_one_place_are_one_whole_and_one_refusal(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = pair
    make_delta(older, newer, tmp_path / "wanted")
    write = delta._write_changes

    def write_beside_another(*arguments: Any) -> int:
        monkeypatch.setattr(delta, "_write_changes", write)
        make_delta(older, newer, tmp_path / "out")
        return write(*arguments)

    monkeypatch.setattr(delta, "_write_changes", write_beside_another)
    with pytest.raises(UserError, match="another process made it meanwhile"):
        make_delta(older, newer, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert {path.name for path in tmp_path.iterdir()} == {"older", "newer", "wanted", "out"}
