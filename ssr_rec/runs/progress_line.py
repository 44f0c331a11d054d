"""Prints the one progress line of a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from ssr_rec.common.formatting import decimal, duration, short_number
from ssr_rec.common.saying import progress_mode, say

if TYPE_CHECKING:
    from ssr_rec.common.status_line import StatusLine


def format_progress(row: Mapping[str, Any], total_steps: int | None = None, eta_s: float | None = None) -> str:
    """Return the progress line of a ``train`` row of metrics.jsonl.

    ``step 1200/1953  24.1k samples/s  wait 0.4 %  loss .5123  auc .7123  eta 1m32s``

    Args:
        row: needs ``step``; ``samples_per_s``, ``data_wait`` (share of the time), ``loss`` and
            ``tasks[label]["auc"]``, of a number ``["xauc"]``, are shown when they are there.
        total_steps: steps of the whole run, when known.
        eta_s: seconds left, when known.
    """
    parts = [f"step {row['step']}" + (f"/{total_steps}" if total_steps else "")]
    if row.get("samples_per_s") is not None:
        parts.append(f"{short_number(row['samples_per_s'])} samples/s")
    if row.get("data_wait") is not None:
        parts.append(f"wait {100 * row['data_wait']:.1f} %")
    if row.get("loss") is not None:
        # A loss of nan must be read as such, not as a missing one.
        parts.append(f"loss {'nan' if math.isnan(row['loss']) else decimal(row['loss'])}")
    tasks = row.get("tasks") or {}
    for measure in ("auc", "xauc"):
        found = {name: task[measure] for name, task in tasks.items() if task.get(measure) is not None}
        if len(found) == len(tasks) == 1:
            parts.append(f"{measure} {decimal(next(iter(found.values())))}")
        elif found:
            parts.append(f"{measure} " + ", ".join(f"{name} {decimal(value)}" for name, value in found.items()))
    if eta_s is not None:
        parts.append(f"eta {duration(eta_s)}")
    return "  ".join(parts)


class Progress:
    """Prints the progress line on rank 0: with a bar and changed in place on a terminal, else plain every so often.

    Unless ``SSR_REC_PROGRESS`` asks for something else (``ssr_rec/common/saying.py``).

    Args:
        total_steps: steps of the whole run; None when unknown, then there is no eta.
        first_step: steps done before this process started, so that a resumed run has the right eta.
        rank: other ranks than 0 print nothing.
        stream: stderr by default.
        seconds_between_lines: least time between two lines when the stream is no terminal.
        clock: seconds, monotonic.

    Raises:
        UserError: ``SSR_REC_PROGRESS`` names no mode.
    """

    def __init__(
        self,
        total_steps: int | None,
        first_step: int = 0,
        rank: int = 0,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self.enabled = rank == 0
        self.stream = stream if stream is not None else sys.stderr
        self.seconds_between_lines = seconds_between_lines
        self.clock = clock
        self.started = clock()
        self._printed_at = -math.inf
        self._mode = progress_mode()
        self._status: StatusLine | None = None
        if self.enabled and self._mode == "auto" and self.stream.isatty():
            # rich takes a tenth of a second to load, and most processes write to no terminal.
            from ssr_rec.common.status_line import StatusLine

            status = StatusLine(self.stream)
            self._status = status if status.can_change else None

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a ``train`` row; the last step is always printed."""
        now = self.clock()
        is_last = row["step"] == self.total_steps
        too_soon = self._status is None and not is_last and now - self._printed_at < self.seconds_between_lines
        if not self.enabled or too_soon:
            return
        self._printed_at = now
        eta_s = self._eta(row["step"], now)
        line = format_progress(row, self.total_steps, eta_s)
        if self._status is not None:
            self._status.show(line, row["step"], self.total_steps)
        else:
            say(line, {**row, "steps": self.total_steps, "eta_s": eta_s}, self.stream)

    def note(self, text: str, row: Mapping[str, Any] | None = None) -> None:
        """Print a line that stays, such as the figures of an evaluation.

        Args:
            row: of metrics.jsonl, which a JSON line holds instead of the text.
        """
        if self._status is not None:
            self._status.say(text)
        elif self.enabled:
            say(text, row, self.stream)

    def warn(self, text: str) -> None:
        """Print a line that stays, also where progress is not wanted."""
        if self.enabled and self._mode == "quiet":
            print(text, file=self.stream, flush=True)
        else:
            self.note(text)

    def close(self) -> None:
        """End the line that changes, so that whatever is printed next starts below it."""
        if self._status is not None:
            self._status.close()

    def _eta(self, step: int, now: float) -> float | None:
        done = step - self.first_step
        if self.total_steps is None or done <= 0:
            return None
        return (now - self.started) / done * max(0, self.total_steps - step)
