"""The C++ forms of the operators: built once with this machine's compiler, then loaded by every process.

The library stands in torch's extension cache (``TORCH_EXTENSIONS_DIR``, or ~/.cache/torch_extensions) under a name made
of its sources, torch's version, the compiler and the vector instructions, so that nothing stale is ever loaded.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

SOURCES = Path(__file__).parent / "cpu"
CAPABILITY_FLAGS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


@torch.compiler.assume_constant_result
def load() -> bool:
    """Whether the operators ``torch.ops.ssr_rec`` are there; the first call builds and loads them.

    Where that fails, one warning a process on local rank 0 gives the reason, and the plain forms serve.
    """
    return _load()


@functools.cache
def _load() -> bool:
    try:
        torch.ops.load_library(build())
    except (BuildError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(f"ssr_rec runs its plain, slower operators: {error}", RuntimeWarning, stacklevel=3)
        return False
    count_flops()
    return True


def count_flops() -> None:
    """Tell torch's FLOP counter what the operators with matrix products cost: it cannot look into them."""

    def forward(x: list[int], indices: list[int] | None, weight: list[int], *rest: Any, **kwargs: Any) -> int:
        return 2 * x[0] * math.prod(weight)

    def backward(grad: list[int], *rest: Any, out_shape: list[Any], **kwargs: Any) -> int:
        grad_x, grad_weight = out_shape[:2]
        return (4 if len(grad_x) > 1 else 2) * grad[0] * math.prod(grad_weight)

    register_flop_formula(torch.ops.ssr_rec.view_fusion_forward)(forward)
    register_flop_formula(torch.ops.ssr_rec.view_fusion_backward)(backward)


def build() -> Path:
    """The library, built if it is not there. Processes that come together wait for the one that builds.

    Raises:
        BuildError: no compiler, or it failed, now or before.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C++ compiler {compiler[0]!r}: install one, or set CXX")
    flags = compile_flags()
    target = cache_folder() / f"{build_key(compiler, flags)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock with the process that holds it, however it ends.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_to(target, compiler, flags)
    return target


def cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        return Path(root or Path.home() / ".cache" / "torch_extensions") / "ssr_rec"
    except RuntimeError as error:
        # As a container's user without an entry in its /etc/passwd.
        raise BuildError("this user has no home folder to build in: set TORCH_EXTENSIONS_DIR") from error


def compile_flags() -> list[str]:
    """For the vector instructions that torch itself uses here; ATEN_CPU_CAPABILITY lowers both."""
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = CAPABILITY_FLAGS.get(capability, "")
    name = capability if vectors else "DEFAULT"
    include = Path(torch.__file__).parent / "include"
    return [
        *["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-w"],
        # A product and sum are one operation where the source says so: forward and backward must round alike.
        "-ffp-contract=off",
        *vectors.split(),
        f"-DCPU_CAPABILITY={name}",
        f"-DCPU_CAPABILITY_{name}",
        f"-isystem{include}",
        f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
    ]


def build_key(compiler: list[str], flags: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((torch.__version__, version, compiler, flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def compile_to(target: Path, compiler: list[str], flags: list[str]) -> None:
    """Build into a folder of its own, then move the library to its place in one step.

    Raises:
        BuildError: the compiler failed. Its output stays beside ``target``, so that no process tries again.
    """
    log = target.with_suffix(".log")
    if log.exists():
        raise BuildError(f"the compiler failed; {log} has its output, delete it to try again")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        units = {source: Path(folder) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
        commands = [[*compiler, *flags, "-c", str(source), "-o", str(unit)] for source, unit in units.items()]
        errors = run_together(commands)
        library = Path(folder) / target.name
        if not errors:
            errors = run_together(
                [[*compiler, "-shared", *map(str, units.values()), *link_flags(), "-o", str(library)]]
            )
        if errors:
            log.write_text(errors)
            return compile_to(target, compiler, flags)
        os.replace(library, target)
    return None


def link_flags() -> list[str]:
    """torch's libraries, and the OpenMP that torch itself loads: a second one would have a thread pool of its own."""
    folder = Path(torch.__file__).parent / "lib"
    openmp = next((str(path) for path in folder.glob("libgomp*.so*")), "-fopenmp")
    return [f"-L{folder}", "-ltorch_cpu", "-ltorch", "-lc10", openmp]


def run_together(commands: list[list[str]]) -> str:
    """The output of the commands that failed, empty if none did; as many run at once as this process has cores."""
    at_once, failed = max(1, len(os.sched_getaffinity(0))), ""
    for start in range(0, len(commands), at_once):
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands[start : start + at_once]
        ]
        outputs = [process.communicate()[0] for process in running]
        failed += "".join(out for out, process in zip(outputs, running, strict=True) if process.returncode)
    return failed
