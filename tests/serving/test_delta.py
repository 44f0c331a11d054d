"""What a delta makes of the older artifact is the newer one to the bit, or nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ssr_rec.data.schema import Schema
from ssr_rec.serving.artifact import MODEL_FILE, Machine, Parity, read_manifest, write_manifest
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
    delta = tmp_path / "delta"
    make_delta(older, newer, delta)
    before = contents(newer)
    with pytest.raises(ValueError, match="it changes another artifact than"):
        apply_delta(newer, delta, newer)
    with pytest.raises(ValueError, match="already there"):
        make_delta(older, newer, delta)
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
        shutil.copytree(delta, broken, dirs_exist_ok=True)
        (broken / name).unlink() if text is None else (broken / name).write_bytes(text)
        with pytest.raises(ValueError, match=message):
            apply_delta(older, broken, older)
    table = older / "tables" / "main-4.npy"
    whole = table.read_bytes()
    table.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(ValueError, match=r"main-4.npy: missing or damaged"):
        apply_delta(older, delta, tmp_path / "out")
    assert contents(newer) == before
    assert not {"none", "out"} & {path.name for path in tmp_path.iterdir()}
