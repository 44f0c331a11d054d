"""The folder of an artifact: there is always a whole one."""

import os
from pathlib import Path

import pytest

from ssr_rec.serving.artifact import MANIFEST_FILE, new_artifact


def written(out: Path, text: str) -> None:
    with new_artifact(out) as folder:
        (folder / MANIFEST_FILE).write_text(text)


def test_a_new_artifact_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        written(tmp_path / "made", text)
        assert (tmp_path / "made" / MANIFEST_FILE).read_text() == text
        assert list(tmp_path.iterdir()) == [tmp_path / "made"]


def test_stopped_between_old_and_new_the_old_one_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "made", "old")

    rename = os.rename

    def stop(path: Path, to: Path) -> None:
        if to == tmp_path / "made" and path.suffix == ".partial":
            raise KeyboardInterrupt
        rename(path, to)

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "made", "new")
    assert (tmp_path / "made" / MANIFEST_FILE).read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]
