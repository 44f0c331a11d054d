"""The wheel, built from the sdist, holds everything: installed beside the stack, it trains from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


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


def pins(kind: str) -> dict[str, str]:
    """Package -> version of a file of requirements/."""
    found = {}
    for line in (ROOT / "requirements" / f"{kind}.txt").read_text().splitlines():
        if (pin := line.split("#")[0].strip()) and not pin.startswith("-"):
            name, _, version = pin.partition("==")
            found[canonicalize_name(name)] = version
    return found


def test_pip_may_install_what_make_setup_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for kind in ("cpu", "cuda"):
        known = {**pins(kind), **pins("no-deps")}
        for line in (*project["dependencies"], *extras["train"], *extras[kind]):
            wanted = Requirement(line)
            if wanted.name != "ssr_rec":
                assert known[canonicalize_name(wanted.name)] in wanted.specifier, f"{kind}: {line}"
    for line in extras["docs"]:
        assert pins("docs")[canonicalize_name(Requirement(line).name)] in Requirement(line).specifier, line
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in SpecifierSet(project["requires-python"])
