"""Writes and reads an artifact folder: what a run's model became to be served, whole and checked.

``artifact.json`` (the manifest, with the schema and a sha256 of every other file), ``model.pt2`` (the compiled
program), ``tables/*.npy`` (mappable), ``vocabularies/*.parquet`` (as prepared) and ``vocabularies/*.index/`` (the same,
to be mapped and looked up). The folder is written beside its place and renamed. Reading it executes nothing but
``model.pt2``, which is a program: load artifacts you made or trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from ssr_rec.common.errors import UserError
from ssr_rec.common.plain_values import canonical_json, parse_json, read_text
from ssr_rec.common.settings import Settings, first_problem
from ssr_rec.common.whole_files import replace_folder
from ssr_rec.data.features import InnerPath
from ssr_rec.data.schema import Schema
from ssr_rec.data.splits import Lookups
from ssr_rec.metrics.links import Link
from ssr_rec.runs.folder import write_json
from ssr_rec.serving.quantized_tables import Precision

MANIFEST_FILE = "artifact.json"
MODEL_FILE = "model.pt2"
TABLES_FOLDER = "tables"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 2**26
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
"""Of torch's CPU kernels, each with the instructions of those before it."""


class Machine(Settings):
    """Says what ``model.pt2`` was compiled for."""

    torch: str
    machine: str
    cpu_capability: str

    @classmethod
    def here(cls) -> Machine:
        return cls(
            torch=torch.__version__,
            machine=platform.machine(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
        )


class Parity(Settings):
    """Says how far the artifact's probabilities were from those of the trainer's eager model when it was made."""

    split: str
    rows: int
    max_difference: float
    mean_difference: float
    max_logit_difference: float
    tolerance: float = Field(description="of max_difference; export refuses a larger one")


class Manifest(Settings):
    format_version: Literal[1] = 1
    dataset: Schema = Field(description="without its splits")
    trained_values: dict[str, Lookups] = Field(
        default_factory=dict,
        description="per feature, of the rows trained on; none: exported before 2026-11-30, or of an older dataset",
    )
    tables: Precision
    dense: Literal["fp32", "bf16"]
    pooling: Literal["mean", "sum"]
    over_arch: dict[str, Any] = Field(description="its config")
    stacks: dict[str, InnerPath] = Field(description="name -> file of its tables")
    histories: list[list[str]] | None = Field(
        None, description="list features of each sequence with an encoder; None: a program whose rows share no lists"
    )
    links: dict[str, Link] = Field({}, description="task whose label is a number -> how its logit becomes a prediction")
    parity: Parity
    measures: dict[str, dict[str, dict[str, float | None]]] = Field(
        description="eager and artifact -> task -> measure, on the rows of parity"
    )
    source: dict[str, Any] = Field(description="run, checkpoint, versions, git commit")
    compiled_for: Machine
    files: dict[InnerPath, Annotated[list[int | str], Field(min_length=2, max_length=2)]] = Field(
        description="name -> bytes and sha256 of every other file"
    )

    @model_validator(mode="after")
    def _linked(self) -> Manifest:
        if set(self.links) != set(self.dataset.number_names):
            raise UserError(f"links are of {', '.join(self.links)}, numbers {', '.join(self.dataset.number_names)}")
        return self


def read_manifest(folder: Path, check_files: bool = True) -> Manifest:
    """Return the manifest of an artifact.

    Args:
        check_files: read every file and compare its checksum.

    Raises:
        UserError: not an artifact, a damaged one, or one compiled for another machine or torch.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise UserError(f"{folder}: not an artifact, it has no {MANIFEST_FILE}; make one with tools/export.py")
    text = read_text(path, MAX_MANIFEST_BYTES, "export the run again")
    try:
        values = parse_json(text)
        if not isinstance(values, dict):
            raise UserError("not a mapping")
        checksum = values.pop("sha256", None)
        if checksum != digest_of(values):
            raise UserError("its contents do not have its checksum")
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: not a manifest of format {FORMAT_VERSION}: {first_problem(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; export the run again") from None
    files = {folder / name: size_and_digest for name, size_and_digest in manifest.files.items()}
    for file, (size, _) in files.items():
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file}: missing or damaged; export the run again")
    if check_files:
        # The largest first, so that no core is left with it in the end.
        ordered = sorted(files, key=lambda file: -int(files[file][0]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for file, found in zip(ordered, pool.map(sha256_of, ordered), strict=True):
                if found != files[file][1]:
                    raise UserError(f"{file}: missing or damaged; export the run again")
    for name in [MODEL_FILE, *manifest.stacks.values()]:
        if name not in manifest.files:
            raise UserError(f"{path}: damaged: {name} is not among its files; export the run again")
    _check_machine(manifest.compiled_for, path)
    return manifest


def _check_machine(made_for: Machine, path: Path) -> None:
    here = Machine.here()
    for key in ("torch", "machine"):
        there, mine = getattr(made_for, key), getattr(here, key)
        if there != mine:
            raise UserError(f"{path}: compiled for {key} {there}, this is {mine}; export the run again here")
    known = made_for.cpu_capability in CAPABILITIES and here.cpu_capability in CAPABILITIES
    if (not known and made_for != here) or (known and _rank(made_for) > _rank(here)):
        raise UserError(
            f"{path}: compiled for {made_for.cpu_capability}, this machine has {here.cpu_capability}; "
            "export the run again here"
        )


def _rank(machine: Machine) -> int:
    return CAPABILITIES.index(machine.cpu_capability)


def write_manifest(folder: Path, values: dict[str, Any]) -> Manifest:
    """Write the manifest of the files in ``folder``; ``values`` are those of ``Manifest`` but ``files``."""
    files: dict[str, list[int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = [path.stat().st_size, sha256_of(path)]
    manifest = Manifest.model_validate({**values, "files": files})
    plain = json.loads(json.dumps(manifest.model_dump(mode="json")))
    if not plain["links"]:
        del plain["links"]  # so that programs from before there were any read it
    write_json(folder / MANIFEST_FILE, {**plain, "sha256": digest_of(plain)})
    return manifest


def digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values)).hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_artifact(out: Path) -> Iterator[Path]:
    """Yield a folder to write to, which becomes ``out`` when the block ends well, and vanishes when it does not.

    An older artifact stays at ``out`` until then, and comes back if the exchange of the two is interrupted.

    Raises:
        UserError: ``out`` is there and is not an artifact, which would be replaced.
    """
    if out.exists() and not (out / MANIFEST_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: there is something else in it; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    work.mkdir()
    try:
        yield work
        replace_folder(work, out, work.with_suffix(".old"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
