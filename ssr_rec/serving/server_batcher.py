"""Scores the requests that wait together, in a thread of its own, so that the event loop goes on answering."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ssr_rec.serving.raw_rows import Encoded
from ssr_rec.serving.scorer import Scorer

Probabilities = dict[str, np.ndarray]


class Busy(Exception):
    """Too many rows wait; the client should try again later."""


class Closed(Exception):
    """The batcher takes nothing more; another model's may."""


class TooLate(Exception):
    """A request was not scored in time."""


@dataclass
class Waiting:
    """Holds a request until it is scored."""

    encode: Callable[[Scorer], Encoded]
    """Refuses rows that cannot be read."""
    rows: int
    due: float
    """Until when its answer is of use, by ``time.monotonic``."""
    answer: Future[Probabilities] = field(default_factory=Future)
    came: float = field(default_factory=time.monotonic)


class Batcher:
    """Scores waiting requests together; a request that stands alone is scored as ``Scorer.predict`` does, bit for bit.

    Args:
        batch_rows: requests are taken together while they have no more rows.
        wait_s: how long the first one waits for others.
        queue_rows: rows that may wait.

    Attributes:
        told: called after each batch with its rows and requests.
        tell_waiting: called with the rows that wait wherever their number changes.
    """

    def __init__(self, scorer: Scorer, batch_rows: int, wait_s: float, queue_rows: int) -> None:
        self.scorer = scorer
        self.batch_rows, self.wait_s, self.queue_rows = batch_rows, wait_s, queue_rows
        self.told: Callable[[int, int], None] = _say_nothing
        self.tell_waiting: Callable[[int], None] = _say_nothing
        self._waiting: deque[Waiting] = deque()
        self._rows = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="scorer", daemon=True)
        self._thread.start()

    @property
    def rows_waiting(self) -> int:
        return self._rows

    def submit(self, request: Waiting) -> None:
        """Let a request wait for its turn.

        Raises:
            Busy: too many rows wait already. One that is larger than the queue may wait alone.
            Closed: the batcher was closed.
        """
        with self._changed:
            if self._closed:
                raise Closed
            if self._waiting and self._rows + request.rows > self.queue_rows:
                raise Busy
            self._waiting.append(request)
            self._rows += request.rows
            self.tell_waiting(self._rows)
            self._changed.notify()

    def close(self) -> None:
        """Score what waits, then end the thread; nothing is told any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        # They may know the model that has this batcher, which would wait for the garbage collector.
        self.told, self.tell_waiting = _say_nothing, _say_nothing

    def _serve(self) -> None:
        batch: list[Waiting] | None = None
        try:
            while (batch := self._next()) is not None:
                if batch:
                    self._answer(batch)
        finally:  # whatever ended the thread, nobody may wait for it
            with self._changed:
                self._closed = True
                for request in (*(batch or ()), *self._waiting):
                    if not request.answer.done():
                        request.answer.set_exception(Closed())

    def _next(self) -> list[Waiting] | None:
        """Return the requests of the next batch, None when the batcher is closed and nothing waits."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            until = self._waiting[0].came + self.wait_s
            while self._rows < self.batch_rows and not self._closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch: list[Waiting] = []
            rows = 0
            while self._waiting and (not batch or rows + self._waiting[0].rows <= self.batch_rows):
                request = self._waiting.popleft()
                self._rows -= request.rows
                if not request.answer.set_running_or_notify_cancel():
                    continue  # nobody waits for it any more
                if time.monotonic() > request.due:
                    request.answer.set_exception(TooLate())
                else:
                    batch.append(request)
                    rows += request.rows
            self.tell_waiting(self._rows)
            return batch

    def _answer(self, batch: Sequence[Waiting]) -> None:
        good: list[tuple[Waiting, Encoded]] = []
        for request in batch:
            try:
                good.append((request, request.encode(self.scorer)))
            except BaseException as error:  # a fault in one request must not be an answer to another
                request.answer.set_exception(_plain(error))
        if not good:
            return
        try:
            found = self.scorer.predict_encoded(_joined([encoded for _, encoded in good]))
        except BaseException as error:
            for request, _ in good:
                request.answer.set_exception(_plain(error))
            return
        self.told(sum(request.rows for request, _ in good), len(good))
        start = 0
        for request, encoded in good:
            stop = start + encoded.rows
            request.answer.set_result({label: values[start:stop] for label, values in found.items()})
            start = stop


def _say_nothing(*numbers: int) -> None:
    pass


def _plain(error: BaseException) -> Exception:
    """Return an error that does not end the thread, or the event loop, in which it is raised again."""
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _joined(parts: Sequence[Encoded]) -> Encoded:
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([part.ids for part in parts], axis=1)
    lists: list[tuple[np.ndarray, np.ndarray]] = []
    of_rows: list[np.ndarray | None] = []
    for place, same in enumerate(zip(*(part.lists for part in parts), strict=True)):
        sizes = np.cumsum([0, *(offsets[-1] for _, offsets in same)])
        offsets = [(own if at == 0 else own[1:]) + sizes[at] for at, (_, own) in enumerate(same)]
        lists.append((np.concatenate([values for values, _ in same]), np.concatenate(offsets)))
        shared = [part.of_rows[place] for part in parts]
        if all(rows is None for rows in shared):
            of_rows.append(None)
            continue
        before = np.cumsum([0, *(len(own) - 1 for _, own in same)])
        each = [np.arange(part.rows) if rows is None else rows for part, rows in zip(parts, shared, strict=True)]
        of_rows.append(np.concatenate([rows + first for rows, first in zip(each, before, strict=False)]))
    dense = [part.dense for part in parts if part.dense is not None]
    weights = None
    if parts[0].weights is not None:
        of_lists = zip(*(part.weights for part in parts if part.weights is not None), strict=True)
        weights = [None if own[0] is None else np.concatenate(own) for own in of_lists]
    return Encoded(ids, lists, of_rows, np.concatenate(dense) if dense else None, weights)
