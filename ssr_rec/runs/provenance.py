"""Says what a run ran on: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


def versions() -> dict[str, str | None]:
    """Return versions of what a result depends on; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "torchrec": _installed("torchrec", "torchrec-cpu"),
        "fbgemm_gpu": _installed("fbgemm-gpu", "fbgemm-gpu-cpu"),
        "triton": _installed("triton"),
        "numpy": np.__version__,
    }


def _installed(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def hardware() -> dict[str, Any]:
    """Return CPU model, usable cores, memory in GiB, and the GPUs of this host (an empty list without any)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    """Return the name in /proc/cpuinfo, else the architecture: ARM and other systems do not have it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit(folder: str | Path = Path(__file__).parent) -> str | None:
    """Return the commit of the checkout the code runs from, ending in ``-dirty`` when ``git status`` shows changes.

    None without git, outside a checkout, or for a folder that the surrounding checkout does not track, such as a
    package installed in a virtual environment.
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return f"{commit}-dirty" if commit and changes else commit


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Return what a git command prints; None when it fails or there is no git."""
    try:
        # No optional locks: status would otherwise rewrite the index under somebody's running git command.
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
