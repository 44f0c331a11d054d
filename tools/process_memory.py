"""Reads the memory of a process from Linux itself."""

from __future__ import annotations

from pathlib import Path


def resident(process: int | str = "self") -> dict[str, int]:
    """Resident bytes of a process: ``now``, and at most so far (``peak``); 0 where there is none such.

    Not ``ru_maxrss``: there a process begins with the peak of the one that started it.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    figures = dict(line.split(":", 1) for line in lines)
    return {name: int(figures.get(key, "0").split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}
