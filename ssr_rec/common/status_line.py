"""Draws the one line of a terminal that changes in place, with a bar of what is done; what is said stays above it."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

BAR_WIDTH = 20


class StatusLine:
    """Changes when it is told to and at no other time, so that no thread runs beside a training.

    Args:
        stream: a terminal. While the line is there, what is printed to ``sys.stderr`` goes above it; so does what is
            printed to ``sys.stdout``, where that is a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
        # rich would print here what is meant for a file; an object that somebody put there may not say what it is.
        shares = getattr(sys.stdout, "isatty", bool)()
        self._bar = Progress(
            BarColumn(BAR_WIDTH), text, console=self._console, auto_refresh=False, redirect_stdout=shares
        )
        self._task = self._bar.add_task("", visible=False)

    @property
    def can_change(self) -> bool:
        """Return whether the terminal can change a line in place, which its environment may deny."""
        console = self._console
        return console.is_terminal and console.is_interactive and not console.is_dumb_terminal

    def show(self, text: str, done: float, total: float | None) -> None:
        """Show a text and how much is done; a bar without end where the total is not known."""
        if not self._bar.live.is_started:
            self._bar.start()
            # rich shows the cursor again when it stops, which a killed process never does.
            self._console.show_cursor(True)
        self._bar.update(self._task, description=text, completed=done, total=total, visible=True, refresh=True)

    def say(self, text: str) -> None:
        """Print a line that stays above the one that changes."""
        self._console.print(text)

    def close(self) -> None:
        """Leave the line as it is; what is printed next starts below it, and ``show`` starts another."""
        if self._bar.live.is_started:
            self._bar.stop()
