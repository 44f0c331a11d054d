"""Prints what a command is doing, on stderr and in the form that its user chose.

``SSR_REC_PROGRESS``, which ``ssr-rec --progress MODE COMMAND`` sets, is one of ``MODES``. Results on stdout, errors and
warnings are printed in every mode.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from ssr_rec.common.errors import UserError

VARIABLE = "SSR_REC_PROGRESS"
MODES = {
    "auto": "a bar and a line that change in place on a terminal, else plain lines",
    "plain": "plain lines, also on a terminal",
    "json": "one JSON object a line",
    "quiet": "nothing but warnings and errors",
}


def progress_mode() -> str:
    """Return the mode in which this process prints what it is doing.

    Raises:
        UserError: the environment names another one.
    """
    mode = os.environ.get(VARIABLE) or "auto"
    if mode not in MODES:
        raise UserError(f"{VARIABLE}={mode}: choose one of {', '.join(MODES)}")
    return mode


def say(text: str, values: Mapping[str, Any] | None = None, stream: TextIO | None = None) -> None:
    """Print a line of progress at once.

    Args:
        values: what a JSON line holds instead of ``{"message": text}``.
        stream: stderr by default.
    """
    mode = progress_mode()
    if mode != "quiet":
        line = json.dumps(_without_nan(values or {"message": text})) if mode == "json" else text
        print(line, file=stream or sys.stderr, flush=True)


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with null for NaN, which JSON does not have."""
    return {
        key: _without_nan(value) if isinstance(value, Mapping) else None if value != value else value
        for key, value in values.items()
    }
