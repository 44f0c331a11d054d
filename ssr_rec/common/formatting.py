"""Writes numbers in the short ways that lines, tables and figures share."""

from __future__ import annotations

import math


def decimal(value: float | None, digits: int = 4) -> str:
    """Return a measure without its leading zero: ``.7123``, ``-.0012``, ``1.0417``; ``-`` for None or nan."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def probability(p: float) -> str:
    """Return a test's p as ``.0312``, ``<.0001`` below that, ``-`` for nan."""
    return "<.0001" if p < 0.0001 else decimal(p)


def short_number(value: float) -> str:
    """Return three significant digits with k, M, G or T: ``24.1k``, ``1.57M``, ``960``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.6 of a unit would print as 1e+03 of it, so it belongs to the next one.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write seconds as ``42s``, ``1m32s``, ``2h05m``, ``3d04h``."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86_400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86_400}d{s % 86_400 // 3600:02d}h"
