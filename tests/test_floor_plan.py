"""Every package imports only itself and the packages above it, so that a behaviour has one place."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ssr_rec"
ORDER = [
    "common", "kernels", "metrics", "data", "over_archs", "sequences", "config", "embeddings", "model", "checkpointing",
    "training", "runs", "serving", "explaining", "planning", "train", "estimator", "studies", "commands",
]  # fmt: skip


def imports(path: Path) -> list[str]:
    """Dotted names of what a file imports from this package, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [name for name in names if name.split(".")[0] == "ssr_rec"]
    return found


def test_no_import_points_upwards():
    upwards = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for name in imports(path):
            if ORDER.index(name.split(".")[1]) > ORDER.index(room):
                upwards.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not upwards


def test_the_root_has_few_rooms():
    rooms = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(rooms) <= 20
    assert {room.removesuffix(".py") for room in rooms} <= {*ORDER, "__init__"}


def test_every_package_has_its_page_of_docstrings():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.stem for path in (PACKAGE.parent / "docs" / "api").glob("*.md")} == packages


def test_reading_a_config_imports_neither_torch_nor_torchrec():
    code = "import sys, ssr_rec.config.run; sys.exit(bool({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0
