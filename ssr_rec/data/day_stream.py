"""Defines the course of a training: epochs of global batches, passes over one split or days one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ssr_rec.data.batch import Batch
from ssr_rec.data.batch_order import share_cut
from ssr_rec.data.reader import Prefetcher, Reader
from ssr_rec.data.schema import Schema


class Course(Protocol):
    """Gives the global batches by step of the run, on any number of ranks, as ``Reader`` and ``DayStream`` do."""

    schema: Schema
    num_rows: int

    def num_steps(self, epochs: int) -> int:
        """Return steps of the whole run, ``epochs`` being ``train.epochs``."""

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch that ``step`` (from 0) lies in, and which of its steps it is."""

    def end_of(self, epoch: int) -> int:
        """Return the first step after ``epoch``."""

    def epochs_done(self, steps: int) -> float:
        """Return epochs in the first ``steps`` steps."""

    def rows_in_step(self, step: int) -> int:
        """Return rows of the global batch of ``step``, over all ranks."""

    def epoch(self, epoch: int, start_step: int = 0) -> Prefetcher:
        """Yield this rank's batches of an epoch from its step ``start_step`` on."""

    def describe(self, epoch: int, step: int) -> str:
        """Return where the rows of a step of an epoch are stored."""

    def share_cut(self) -> float | None:
        """Return about what share of the groups whose rows lie together the ends of lanes and batches cut."""

    def position(self) -> dict[str, Any]:
        """Return what the number of a step must mean the same rows under, as JSON values."""


class DayStream:
    """Gives days in order of time, each an epoch; a day is shuffled and passed ``passes`` times before the next begins.

    Args:
        open_day: the reader of a day; called when the day is reached, and the one before is let go.
        days: splits of ``schema`` in order of time.
        batch_size: that of the readers: a global batch never holds rows of two days.
    """

    def __init__(
        self, open_day: Callable[[str], Reader], schema: Schema, days: Sequence[str], passes: int, batch_size: int
    ) -> None:
        self.schema, self.days, self.passes, self.batch_size = schema, list(days), passes, batch_size
        self.rows = [schema.splits[day].num_rows for day in days]
        self.num_rows = sum(self.rows)
        self.steps_of_pass = [-(-rows // batch_size) for rows in self.rows]
        self.ends = np.cumsum([passes * steps for steps in self.steps_of_pass])
        self._open_day = open_day
        self._reader = open_day(days[0])
        self._first_day = self._reader.position()

    def num_steps(self, epochs: int) -> int:
        assert epochs == self.passes
        return int(self.ends[-1])

    def locate(self, step: int) -> tuple[int, int]:
        day = int(np.searchsorted(self.ends, step, side="right"))
        return day, step - (self.end_of(day - 1) if day else 0)

    def end_of(self, epoch: int) -> int:
        return int(self.ends[epoch])

    def epochs_done(self, steps: int) -> float:
        day, step = self.locate(steps)
        return day + (step / (self.passes * self.steps_of_pass[day]) if step else 0.0)

    def rows_in_step(self, step: int) -> int:
        day, step = self.locate(step)
        return min(self.batch_size, self.rows[day] - step % self.steps_of_pass[day] * self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Prefetcher:
        reader = self._day(epoch)
        return Prefetcher(self._batches(reader, start_step), reader.prefetch)

    def _batches(self, reader: Reader, start_step: int) -> Iterator[Batch]:
        first, step = divmod(start_step, reader.steps_per_epoch)
        for number in range(first, self.passes):
            yield from reader.batches(number, step if number == first else 0)

    def describe(self, epoch: int, step: int) -> str:
        reader = self._day(epoch)
        return reader.describe(*divmod(step, reader.steps_per_epoch))

    def share_cut(self) -> float | None:
        groups = sum(self.schema.splits[day].groups or 0 for day in self.days)
        return share_cut(groups, self.num_rows, sum(self.steps_of_pass) * self._reader.num_lanes)

    def position(self) -> dict[str, Any]:
        rows = {day: self.schema.splits[day].num_rows for day in self.days}
        return {**self._first_day, "num_rows": rows, "passes": self.passes}

    def _day(self, epoch: int) -> Reader:
        if self._reader.split != self.days[epoch]:
            self._reader = self._open_day(self.days[epoch])
        return self._reader
