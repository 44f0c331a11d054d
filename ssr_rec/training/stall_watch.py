"""Names a stalled rank and ends the job, which would wait for it for ever; lets SIGTERM and Ctrl-C ask to stop."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import torch.distributed as dist

PREEMPTED, STALLED = 75, 76
"""Exit codes: asked to stop, with a checkpoint written (try again, as in sysexits.h); a rank stalled."""
STOPS = signal.SIGTERM, signal.SIGINT
SAME_REQUEST_S = 5.0


class Preempted(Exception):
    """The run was asked to stop and has written its checkpoint."""


class StallWatch:
    """Every rank says in the job's store where it is; one that has not moved for a time ends this process.

    Args:
        timeout_s: seconds without a ``beat`` after which a rank counts as stalled; None watches nothing.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._where, self._moved_at = "start", time.monotonic()
        self._ended = threading.Event()
        if timeout_s is not None:
            self._every = min(10.0, timeout_s / 4)
            self._store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
            self._thread = threading.Thread(target=self._run, daemon=True, name="ssr_rec-watch")
            self._thread.start()

    def beat(self, where: str) -> None:
        """Note that this rank has come as far as ``where``."""
        self._where, self._moved_at = where, time.monotonic()

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        assert self.timeout_s is not None
        tick = 0
        while not self._ended.wait(self._every):
            tick += 1
            still_s = time.monotonic() - self._moved_at
            report = {"tick": tick, "where": self._where, "host": socket.gethostname(), "pid": os.getpid()}
            try:
                _in_time(partial(self._store.set, self._key(self.rank), json.dumps(report)), 2 * self._every)
                if still_s < self.timeout_s:
                    continue
                said = self._who_stalled()
            except (RuntimeError, OSError):
                if still_s < self.timeout_s:
                    continue
                said = "the process that hosts the job's store does not answer: rank 0, or torchrun on the first host"
            if not self._ended.is_set():
                print(
                    f"error: no progress for {still_s:.0f} s (train.stall_timeout_s={self.timeout_s:g}), "
                    f"rank {self.rank} is at {self._where}: {said}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED)

    def _who_stalled(self) -> str:
        """Name the silent ranks, or else where every rank is."""
        before = self._reports()
        self._ended.wait(2 * self._every)
        now = self._reports()
        silent = [rank for rank in now if rank != self.rank and now[rank]["tick"] == before[rank]["tick"]]
        if silent:
            return "; ".join(
                f"rank {rank} (host {now[rank].get('host', '?')}, pid {now[rank].get('pid', '?')}) is silent, "
                f"last seen at {now[rank]['where']}"
                for rank in silent
            )
        return "all ranks answer: " + "; ".join(f"rank {rank} at {now[rank]['where']}" for rank in now)

    def _reports(self) -> dict[int, dict[str, Any]]:
        return cast(dict[int, dict[str, Any]], _in_time(self._read_reports, 2 * self._every))

    def _read_reports(self) -> dict[int, dict[str, Any]]:
        reports = {}
        for rank in range(self.world_size):
            key = self._key(rank)
            found = json.loads(self._store.get(key)) if self._store.check([key]) else {"tick": 0, "where": "start"}
            reports[rank] = found
        return reports

    @staticmethod
    def _key(rank: int) -> str:
        return f"ssr_rec/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _in_time(function: Callable[[], Any], seconds: float) -> Any:
    """Return what ``function`` returns; the store's own time limit does not cover a server that has stopped.

    Raises:
        TimeoutError: it has not returned in time.
    """
    done: queue.Queue[Any] = queue.Queue(1)

    def call() -> None:
        try:
            done.put(function())
        except Exception as error:
            done.put(error)

    threading.Thread(target=call, daemon=True, name="ssr_rec-store").start()
    try:
        value = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if isinstance(value, Exception):
        raise value
    return value


@contextmanager
def stop_when_asked() -> Iterator[Callable[[], bool]]:
    """Inside the block SIGTERM and Ctrl-C only set what the yielded function returns; needs the main thread.

    A terminal and a launcher may both pass on the same Ctrl-C, so what comes within ``SAME_REQUEST_S`` is one request,
    also after the block. A signal after that acts as it did before the block.
    """
    # Not an Event: a signal may interrupt the handler of the one before it, which would wait for its own lock.
    asked_at: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {kind: signal.getsignal(kind) for kind in STOPS}

    def ask(kind: int, frame: FrameType | None) -> None:
        if not asked_at:
            asked_at.append(time.monotonic())
        elif time.monotonic() > asked_at[0] + SAME_REQUEST_S:
            act_as_before()
            signal.raise_signal(kind)

    def act_as_before() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    for kind in STOPS:
        signal.signal(kind, ask)
    try:
        yield lambda: bool(asked_at)
    finally:
        if not asked_at:
            act_as_before()
