"""Runs one case of bench_inference.py in a process: it loads the case, then answers what it is asked over a pipe.

One process a case, so that its memory is its own; they all stay, so that the cases can take turns.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from inference_cases import Case, Rows, Score, draw_rows, read_rows, requests_of, timed_load
from inference_raw import raw_rows
from process_memory import resident

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.serving.latency import Requests, drive
from ssr_rec.serving.scorer import load

ROWS = 16_384
"""Rows that requests are drawn from, or the largest batch."""
FOLD_ROWS = 1_024
"""Rows of a request when the whole test fold is scored."""


RAW_REQUESTS = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
"""cpu: of the one client's thread, which does all the work where there is one torch thread."""


class Failed(Exception):
    """Is raised when something went wrong in a worker, with its own words."""


class Worker:
    """Starts a worker and asks it from this side of the pipe.

    Raises:
        ValueError: what the worker's ValueError said.
        Failed: its traceback, for any other error, or that it is gone.
    """

    def __init__(self, case: Case, batches: list[int], seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.case = case
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, case, batches, seed), daemon=True)
        self._process.start()
        theirs.close()
        self.loaded: dict[str, Any] = self._answer()

    def ask(self, what: str, *arguments: Any) -> Any:
        self._pipe.send((what, *arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"{self.case.name}: its process ended with {self._process.exitcode}") from None
        if kind == "bad":
            raise UserError(value)
        if kind == "error":
            raise Failed(f"{self.case.name}:\n{value}")
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def serve(pipe: Connection, case: Case, batches: list[int], seed: int) -> None:
    """Be the worker's side: answer every request until the pipe closes."""
    quiet()
    torch.set_num_threads(case.threads)
    try:
        served = Served(case, batches, seed)
        pipe.send(("ok", served.loaded))
        while True:
            what, *arguments = pipe.recv()
            pipe.send(("ok", getattr(served, what)(*arguments)))
    except EOFError:
        return
    except ValueError as error:
        pipe.send(("bad", str(error)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


class Served:
    """Holds a loaded case and its requests."""

    def __init__(self, case: Case, batches: list[int], seed: int) -> None:
        self.case = case
        rows = max(ROWS, *batches)
        self.rows: Rows = (
            draw_rows(case.schema, rows, seed) if case.data is None else read_rows(case.data, case.schema, rows)
        )
        self.requests = {batch: requests_of(self.rows, batch, seed) for batch in batches}
        raw = {batch: self._raw(batch) for batch in batches} if case.raw else {}
        before = resident()
        self.score: Score
        self.score, seconds = timed_load(case, self.requests[batches[0]][0])
        if case.raw:
            assert case.source is not None
            predict = load(case.source).predict
            self.send = {batch: [functools.partial(predict, rows) for rows in pool] for batch, pool in raw.items()}
        else:
            self.send = {
                batch: [functools.partial(self.score, *request) for request in pool]
                for batch, pool in self.requests.items()
            }
        self.loaded = {"load_s": seconds, "before_bytes": before["now"]}

    def _raw(self, batch: int) -> list[list[dict[str, Any]]] | list[pa.Table]:
        assert self.case.source is not None
        last = len(self.rows) - batch
        starts = [last * i // (RAW_REQUESTS - 1) for i in range(RAW_REQUESTS)]
        mappings = [raw_rows(self.case.schema, self.case.source, self.rows, at, at + batch) for at in starts]
        return [pa.Table.from_pylist(rows) for rows in mappings] if self.case.raw == "Arrow" else mappings

    def drive(self, batch: int, clients: int, requests: int | np.ndarray, warmup: int, clock: str) -> Requests:
        """``warmup`` requests unrecorded, since another process has just had the caches, then those asked for."""
        pool = self.send[batch]

        def send(k: int) -> None:
            pool[k % len(pool)]()

        for k in range(warmup):
            send(k)
        return drive(send, requests, clients, now=CLOCKS[clock])

    def memory(self) -> dict[str, int]:
        return resident()

    def fold(self) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and labels (N, T) of the whole test fold."""
        assert self.case.data is not None
        rows = read_rows(self.case.data, self.case.schema)
        assert rows.labels is not None
        starts = range(0, len(rows), FOLD_ROWS)
        logits = [self.score(*rows.request(start, min(start + FOLD_ROWS, len(rows)))).float() for start in starts]
        return torch.cat(logits).numpy(), rows.labels
