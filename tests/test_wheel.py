"""The wheel holds everything: installed beside the stack, it trains and plans from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    run(*pip, *build, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("ssr_rec-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)

    where = run("-c", "import ssr_rec.planning.hardware as h; print(h.__file__)", cwd=elsewhere, site=site)
    assert Path(where.strip()).is_relative_to(site)
    synthetic = [f"--data.synthetic.{split}_rows=600" for split in ("train", "validation", "test")]
    small = ["--data.synthetic.users=50", "--data.synthetic.items=50", "--train.batch_size=128", "--train.max_steps=2"]
    said = run(
        *("-m", "ssr_rec.train", "--config", ROOT / "configs" / "smoke.yaml", "--device=cpu", "--name=wheel"),
        *(*synthetic, *small),
        cwd=elsewhere,
        site=site,
    )
    assert "report runs/wheel/report.json" in said and (elsewhere / "runs" / "wheel" / "report.json").is_file()
    tables = ROOT / "configs" / "plan" / "criteo_1tb_tables.yaml"
    planned = run(
        *(ROOT / "tools" / "plan_sharding.py", "--tables", tables, "--nodes", "1", "--gpus-per-node", "2"),
        *("--scale-rows", "0.001", "--over_arch.name=mlp", "--no-remedies"),
        cwd=elsewhere,
        site=site,
    )
    assert "samples/s" in planned
