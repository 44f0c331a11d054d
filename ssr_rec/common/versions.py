"""Refuse a torch / torchrec / fbgemm combination that does not work together, before it fails in C++."""

import gc
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ssr_rec.common.errors import UserError

INSTALL = (
    "install it with make setup, or: pip install 'ssr_rec[cpu]' && pip install --no-deps torchrec==1.8.0 (with a GPU: "
    "pip install 'ssr_rec[cuda]')"
)
TRIOS = {"2.13": "1.8", "2.11": "1.6"}
"""torch minor -> torchrec and fbgemm minor, https://github.com/meta-pytorch/torchrec/releases."""


def check_stack(installed: dict[str, str | None] | None = None) -> None:
    """Compare the installed versions with ``TRIOS``; call before the first ``import torchrec``.

    Args:
        installed: package -> version or None, for tests; default: what is installed.

    Raises:
        UserError: a package is missing, both FBGEMM wheels are there, or the versions do not fit each other;
            the message names the right ones.
    """
    found = installed if installed is not None else _installed()
    torch, torchrec = found["torch"], found["torchrec"]
    fbgemms = {name: found[name] for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if found[name]}
    if len(fbgemms) == 2:
        raise UserError(
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other; uninstall both, "
            "then install requirements/cpu.txt or requirements/cuda.txt in a fresh environment (make setup)"
        )
    wanted = TRIOS.get(_minor(torch)) if torch else None
    if wanted is None:
        raise UserError(f"torch {torch} is not supported; install one of torch {', '.join(TRIOS)} (make setup)")
    for name, have in {"torchrec": torchrec, **(fbgemms or {"fbgemm-gpu or fbgemm-gpu-cpu": None})}.items():
        if have is None or _minor(have) != wanted:
            raise UserError(f"torch {torch} needs {name} {wanted}.x, found {have}; {INSTALL}")


def _minor(full: str) -> str:
    return ".".join(full.split("+")[0].split(".")[:2])


def _installed() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def require_stack(load: str | None = "torchrec.distributed") -> None:
    """Check the versions as a script's first line, ending the process with exit code 2 if wrong, and load its needs.

    While thousands of modules load, Python's collector finds nothing and takes a sixth of the time. What they leave is
    kept out of its later rounds, which would stop a training for a quarter of a second each.

    Args:
        load: the module; None where the script loads none of them at once.
    """
    try:
        check_stack()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if load is not None:
        gc.disable()
        try:
            import_module(load)
        finally:
            gc.enable()
        gc.freeze()
