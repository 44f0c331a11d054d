"""Writes what changed between two artifacts of one dataset, and makes the newer one of the older and that.

A delta has ``delta.json`` (the manifest of the newer artifact, the digest of the older one's, and a checksum), of each
table that changed its rows ``delta/<name>.rows.npy`` and their new values ``delta/<name>.values.npy``, and other files
that changed whole. What it makes is the newer artifact to the bit: every file is compared with its checksum.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import parse_json, read_text
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.data.features import InnerPath
from ssr_rec.runs.folder import write_json
from ssr_rec.serving.artifact import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    digest_of,
    new_artifact,
    read_manifest,
    sha256_of,
)

DELTA_FILE = "delta.json"
CHANGES_FOLDER = "delta"
ROWS_AT_ONCE = 2**18


class Delta(Settings):
    older: str = Field(description="sha256 of the manifest of the artifact that it changes")
    manifest: dict[str, Any] = Field(description="that of the newer one, as it is in its file")
    files: dict[InnerPath, str] = Field(description="name -> sha256 of every other file of the delta")


def make_delta(older: Path, newer: Path, out: Path) -> dict[str, int]:
    """Write to the new folder ``out`` what changed from one artifact to another.

    Returns:
        ``bytes`` of the delta, ``of`` the newer artifact, ``rows`` that changed.

    Raises:
        UserError: no artifacts, tables of different sizes, or ``out`` is there; nothing half-written stays.
    """
    if out.exists():
        raise UserError(f"{out}: already there; choose another folder")
    before, after = read_manifest(older), read_manifest(newer)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        (work / CHANGES_FOLDER).mkdir(parents=True)
        changed_rows = _write_changes((older, before), (newer, after), work)
        try:
            work.rename(out)
        except OSError:
            if not out.exists():
                raise
            raise UserError(f"{out}: another process made it meanwhile; choose another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"bytes": size, "of": sum(int(size) for size, _ in after.files.values()), "rows": changed_rows}


def _write_changes(older: tuple[Path, Manifest], newer: tuple[Path, Manifest], work: Path) -> int:
    """Write the delta to ``work``; returns how many rows of tables changed."""
    (old, before), (new, after) = older, newer
    changed_rows = 0
    tables = set(after.stacks.values())
    for name, (_, digest) in after.files.items():
        if before.files.get(name, [0, ""])[1] == digest:
            continue
        if name in tables and name in before.files:
            rows, values = _changed(old / name, new / name)
            np.save(_changes(work, name, "rows"), rows, allow_pickle=False)
            np.save(_changes(work, name, "values"), values, allow_pickle=False)
            changed_rows += len(rows)
        else:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new / name, work / name)
    files = {str(path.relative_to(work)): sha256_of(path) for path in sorted(work.rglob("*")) if path.is_file()}
    manifest = json.loads((new / MANIFEST_FILE).read_text())
    plain = Delta(older=_digest_of_manifest(old), manifest=manifest, files=files).model_dump(mode="json")
    write_json(work / DELTA_FILE, {**plain, "sha256": digest_of(plain)})
    return changed_rows


def apply_delta(older: Path, delta: Path, out: Path) -> Manifest:
    """Make the newer artifact at ``out``, which may be the older one's place: it appears whole or not at all.

    Files that did not change are links to the older one's where the file system has them, else copies.

    Raises:
        UserError: not a delta, damaged, or one from another artifact than ``older``; or that one is damaged.
    """
    found = _read(delta)
    if _digest_of_manifest(older) != found.older:
        raise UserError(f"{delta}: it changes another artifact than {older}; apply it to the one it was made from")
    for name, digest in found.files.items():
        if not (delta / name).is_file() or sha256_of(delta / name) != digest:
            raise UserError(f"{delta / name}: missing or damaged; make the delta again")
    try:
        plain = {name: value for name, value in found.manifest.items() if name != "sha256"}
        files = Manifest.model_validate(plain).files
    except ValidationError as error:
        raise UserError(f"{delta / DELTA_FILE}: no manifest in it: {first_problem(error)}; make it again") from None
    with new_artifact(out) as work:
        for name, (_, wanted) in files.items():
            target = work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _make(older, delta, name, target)
                problem = "" if sha256_of(target) == wanted else "it is not the file that the delta was made from"
            except FileNotFoundError:
                problem = "missing"
            except (ValueError, IndexError) as error:
                problem = str(error)
            if problem:
                raise UserError(f"{older / name}: damaged: {problem}; deploy the whole newer artifact")
        write_json(work / MANIFEST_FILE, found.manifest)
        try:
            return read_manifest(work, check_files=False)
        except UserError as error:  # that folder is gone when the message is read
            raise UserError(str(error).replace(str(work), str(delta))) from None


def _make(older: Path, delta: Path, name: str, target: Path) -> None:
    """Make one file of the newer artifact."""
    if (delta / name).is_file():
        shutil.copyfile(delta / name, target)
    elif _changes(delta, name, "rows").is_file():
        shutil.copyfile(older / name, target)
        table = np.load(target, mmap_mode="r+", allow_pickle=False)
        rows = np.load(_changes(delta, name, "rows"), allow_pickle=False)
        table[rows] = np.load(_changes(delta, name, "values"), mmap_mode="r", allow_pickle=False)
        table.flush()
    else:
        _link(older / name, target)


def _changed(before: Path, after: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose bytes differ, (n,) int64, and what they are now."""
    old, new = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (before, after))
    if old.shape != new.shape or old.dtype != new.dtype:
        raise UserError(
            f"{after}: {new.dtype} of {new.shape}, {before} is {old.dtype} of {old.shape}: the vocabulary or the "
            "precision is another; deploy the whole artifact"
        )
    found = []
    for start in range(0, len(new), ROWS_AT_ONCE):
        # By their bytes: -0.0 is 0.0 and NaN is not NaN otherwise.
        pair = [np.ascontiguousarray(table[start : start + ROWS_AT_ONCE]).view(np.uint8) for table in (old, new)]
        found.append(start + (pair[0] != pair[1]).any(1).nonzero()[0])
    rows = np.concatenate([np.empty(0, np.int64), *found])
    return rows, new[rows]


def _read(delta: Path) -> Delta:
    path = delta / DELTA_FILE
    if not path.is_file():
        raise UserError(f"{delta}: not a delta, it has no {DELTA_FILE}")
    try:
        found = parse_json(read_text(path, MAX_MANIFEST_BYTES, "make the delta again"))
        if not isinstance(found, dict) or found.pop("sha256", None) != digest_of(found):
            raise UserError("its contents do not have its checksum")
        return Delta.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path}: not a delta: {first_problem(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; make the delta again") from None


def _changes(folder: Path, table: str, what: str) -> Path:
    return folder / CHANGES_FOLDER / f"{Path(table).stem}.{what}.npy"


def _digest_of_manifest(artifact: Path) -> str:
    if not (artifact / MANIFEST_FILE).is_file():
        raise UserError(f"{artifact}: not an artifact, it has no {MANIFEST_FILE}")
    return sha256_of(artifact / MANIFEST_FILE)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
