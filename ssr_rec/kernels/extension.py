"""Builds the C++ forms of the operators once with this machine's compiler, and loads them in every process.

The library stands in torch's extension cache (``TORCH_EXTENSIONS_DIR``, or ~/.cache/torch_extensions, or one under the
temporary folder where there is no home to write to) under a name made of its sources, torch's version and the vector
instructions, so that nothing stale is ever loaded, and with a digest beside it, so that no part of one is.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

SOURCES = Path(__file__).parent / "cpu"
CAPABILITY_FLAGS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}


PASSING = (
    "No space left",
    "Disk quota",
    "Input/output error",
    "annot allocate memory",
    "Killed",
    "Terminated",
    "out of memory",
)
"""In a compiler's output: the machine's trouble of the moment, not the compiler's or the sources'."""


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


@torch.compiler.assume_constant_result
def load() -> bool:
    """Return whether the operators ``torch.ops.ssr_rec`` are there; the first call builds and loads them.

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

    ours = torch.ops.ssr_rec.view_fusion_forward, torch.ops.ssr_rec.view_fusion_backward
    register_flop_formula(ours[0])(forward)
    register_flop_formula(ours[1])(backward)
    # A counter copies the formulas when it is made, which may have been before there were operators.
    for made in gc.get_objects():
        if issubclass(type(made), FlopCounterMode):
            made.flop_registry |= {operator: flop_registry[operator] for operator in ours}


def build() -> Path:
    """Return the library, built if it is not there. Processes that come together wait for the one that builds.

    One that is there needs no compiler, as on a host that only scores.

    Raises:
        BuildError: no compiler, nowhere to build, or the compiler failed, now or before.
    """
    flags = compile_flags()
    name, folders = f"{build_key(flags)}.so", cache_folders()
    for folder in folders:
        if is_whole(folder / name):
            return folder / name
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C++ compiler {compiler[0]!r}: install one, or set CXX")
    target = writable(folders) / name
    # The kernel drops the lock with the process that holds it, however it ends.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole(target):
            compile_to(target, compiler, flags)
    return target


def cache_folders() -> list[Path]:
    """Return where a library may be, the best place first: ``TORCH_EXTENSIONS_DIR``, or home and temporary folder."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return [Path(root) / "ssr_rec"]
    folders = [Path(tempfile.gettempdir()) / f"ssr_rec-{os.getuid()}"]
    with suppress(RuntimeError):  # a container's user without an entry in its /etc/passwd has no home
        folders.insert(0, Path.home() / ".cache" / "torch_extensions" / "ssr_rec")
    return [folder for folder in folders if is_own(folder)]


def is_own(folder: Path) -> bool:
    """Return whether nobody else can have put a library there, or could: what is in it will run in this process."""
    try:
        found = folder.stat()
    except OSError:
        return True  # not there yet, or not for us to see: then nothing is loaded from it
    return found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022


def writable(folders: Sequence[Path]) -> Path:
    """Return the first of the folders that can be written, made if need be.

    Raises:
        BuildError: there is none.
    """
    problems = []
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problems.append(str(error))
    raise BuildError(f"there is no folder to build in: set TORCH_EXTENSIONS_DIR ({'; '.join(problems)})")


def is_whole(library: Path) -> bool:
    """Return whether the file is there as it was built; loading a part of one would end the process by SIGBUS."""
    digest = library.with_suffix(".sha256")
    try:
        return digest.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def compile_flags() -> list[str]:
    """Return the flags for the vector instructions that torch itself uses here; ATEN_CPU_CAPABILITY lowers both."""
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = CAPABILITY_FLAGS.get(capability, "")
    name = capability if vectors else "DEFAULT"
    return [
        *["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-w"],
        # A product and sum are one operation where the source says so: forward and backward must round alike.
        "-ffp-contract=off",
        *vectors.split(),
        f"-DCPU_CAPABILITY={name}",
        f"-DCPU_CAPABILITY_{name}",
    ]


def include_flags() -> list[str]:
    """Return where torch's headers are; not part of the key, as every environment has the same ones elsewhere."""
    include = Path(torch.__file__).parent / "include"
    return [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]


def build_key(flags: list[str]) -> str:
    """Return the key of what the library must fit: torch, vector instructions and sources; any compiler's will do."""
    digest = hashlib.sha256(repr((torch.__version__, flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def compile_to(target: Path, compiler: list[str], flags: list[str]) -> None:
    """Build into a folder of its own, then move the library to its place in one step.

    Raises:
        BuildError: the compiler failed. Unless that may pass, as a full disk does, its output stays beside ``target``,
            so that no process tries again with this compiler.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    log = target.with_suffix(f".{hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]}.log")
    if log.exists():
        raise BuildError(f"the compiler failed; {log} has its output, delete it to try again")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # The longest first, so that no core waits for one at the end.
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: source.stat().st_size, reverse=True)
        units = {source: Path(folder) / f"{source.stem}.o" for source in sources}
        commands = [
            [*compiler, *flags, *include_flags(), "-c", str(source), "-o", str(unit)] for source, unit in units.items()
        ]
        errors = run_together(commands)
        library = Path(folder) / target.name
        if not errors:
            errors = run_together(
                [[*compiler, "-shared", *map(str, units.values()), *link_flags(), "-o", str(library)]]
            )
        if errors:
            # Someone may have removed the environment meanwhile.
            if any(text in errors for text in PASSING) or not Path(torch.__file__).exists():
                raise BuildError(f"the compiler failed, the next process tries again: {errors.strip()[:300]}")
            log.write_text(errors)
            raise BuildError(f"the compiler failed; {log} has its output, delete it to try again")
        digest = Path(folder) / target.with_suffix(".sha256").name
        digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        # A library without its digest, or with that of another, is built again.
        os.replace(library, target)
        os.replace(digest, target.with_suffix(".sha256"))


def link_flags() -> list[str]:
    """Return torch's libraries and the OpenMP that torch loads: a second one would have a thread pool of its own."""
    folder = Path(torch.__file__).parent / "lib"
    openmp = next((str(path) for path in folder.glob("libgomp*.so*")), "-fopenmp")
    return [f"-L{folder}", "-ltorch_cpu", "-ltorch", "-lc10", openmp]


def run_together(commands: list[list[str]]) -> str:
    """Return the output of the commands that failed, empty if none did; as many run at once as there are cores.

    Raises:
        BuildError: no thread can be started.
    """
    failed = ""
    try:
        pool = ThreadPool(min(len(commands), len(os.sched_getaffinity(0))))
    except RuntimeError as error:  # there may be no more threads
        raise BuildError(str(error)) from None
    with pool:
        for done in pool.map(_run, commands, chunksize=1):
            status = done.returncode
            failed += done.stdout if status else ""
            if status < 0 or status > 128:  # as by a stop of the whole job; the compiler itself says nothing then
                failed += f"Killed by signal {-status if status < 0 else status - 128}\n"
    return failed


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
