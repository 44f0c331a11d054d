"""The wheel, built from the sdist, holds everything: installed beside the stack, it trains from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.project import PROJECT, ROOT


def run(*command: str | Path, cwd: Path, site: Path | None = None) -> str:
    """Run Python in a folder, the wheel's files in front of everything else."""
    environment = {**os.environ, "PYTHONPATH": str(site) if site else ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_and_plans_from_another_folder(tmp_path: Path) -> None:
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A copy, since building leaves folders beside the sources.
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "ssr_rec", "launch"):
        (source / name).symlink_to(ROOT / name)
    built = run("-c", "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))", tmp_path, cwd=source)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    run(*pip, *build, tmp_path / built.splitlines()[-1], cwd=tmp_path)
    (wheel,) = tmp_path.glob("ssr_rec-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    command = site / "bin" / "ssr-rec"
    assert "\n  prepare " in run(command, "--help", cwd=elsewhere, site=site)

    where = run("-c", "import ssr_rec.planning.hardware as h; print(h.__file__)", cwd=elsewhere, site=site)
    assert Path(where.strip()).is_relative_to(site)
    synthetic = [f"--data.synthetic.{split}_rows=600" for split in ("train", "validation", "test")]
    small = ["--data.synthetic.users=50", "--data.synthetic.items=50", "--train.batch_size=128", "--train.max_steps=2"]
    said = run(
        *(command, "train", "--config", ROOT / "configs" / "smoke.yaml", "--device=cpu", "--name=wheel"),
        *(*synthetic, *small),
        cwd=elsewhere,
        site=site,
    )
    assert "report runs/wheel/report.json" in said and (elsewhere / "runs" / "wheel" / "report.json").is_file()
    tables = ROOT / "configs" / "plan" / "criteo_1tb_tables.yaml"
    planned = run(
        *(command, "plan", "--tables", tables, "--nodes", "1", "--gpus-per-node", "2"),
        *("--scale-rows", "0.001", "--over_arch.name=mlp", "--no-remedies"),
        cwd=elsewhere,
        site=site,
    )
    assert "samples/s" in planned


def asked(lines: Iterable[str], python: str) -> dict[str, SpecifierSet]:
    """Package -> the versions that those of the lines allow which hold for a Python."""
    found: dict[str, SpecifierSet] = {}
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"python_version": python}):
            name = canonicalize_name(wanted.name)
            found[name] = found.get(name, SpecifierSet()) & wanted.specifier
    return found


def pins(kind: str, python: str) -> dict[str, str]:
    """Package -> version of a file of requirements/."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / f"{kind}.txt").read_text().splitlines())
    return {name: str(pin).removeprefix("==") for name, pin in asked(filter(None, lines), python).items()}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_pip_may_install_what_make_setup_installs(python: str) -> None:
    extras = PROJECT["optional-dependencies"]
    for kind in ("cpu", "cuda"):
        known = {**pins(kind, python), **pins("no-deps", python)}
        lines = (line for extra in ("train", kind, "serve", "tune") for line in extras[extra])
        wanted = asked((*PROJECT["dependencies"], *lines), python)
        for name, versions in wanted.items():
            if name != "ssr-rec":
                assert known[name] in versions, f"{kind}: {name}"
    for name, versions in asked(extras["docs"], python).items():
        assert pins("docs", python)[name] in versions, name
    assert python in SpecifierSet(PROJECT["requires-python"])
