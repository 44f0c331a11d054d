"""Drives requests at a scorer, and says what became of them: closed and open loop, percentiles, spread.

A closed loop has a fixed number of clients; each sends its next request when it has the answer to the last. A slow
answer delays all requests behind it, so that the few that are sent measure little of it: closed loops say what a
server can do, not what its users wait. An open loop sends at times drawn before it starts, whatever the server does,
and counts a request's latency from the time it was due, so that its wait in line is part of it (Tene's "coordinated
omission").
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ssr_rec.common.errors import UserError

TAIL = 10
"""Requests that must lie beyond a percentile before it is stated; fewer are an accident."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True)
class Requests:
    """Records N requests, in the order they were due; float64 (N,), seconds since the first could be sent.

    Attributes:
        due: when each should have been sent; in a closed loop, when it was.
        started: when a client took it up.
        ended: when its answer was there.
    """

    due: np.ndarray
    started: np.ndarray
    ended: np.ndarray

    @property
    def latency(self) -> np.ndarray:
        """Return what whoever sent it waited for: line and service."""
        return self.ended - self.due

    @property
    def service(self) -> np.ndarray:
        """Return what the scorer took."""
        return self.ended - self.started

    @property
    def per_second(self) -> float:
        """Return the answers a second, over the time from the first request to the last answer."""
        return len(self.ended) / float(self.ended.max() - self.due.min())


def poisson_arrivals(rate: float, count: int, seed: int | Sequence[int]) -> np.ndarray:
    """Draw when ``count`` requests of a Poisson process arrive, in seconds: (count,) float64, ascending, from 0 on.

    Args:
        rate: arrivals a second on average.
        seed: the same seed gives the same times.

    Raises:
        UserError: a rate that is not a positive number.
    """
    if not 0 < rate < math.inf:
        raise UserError(f"rate={rate}: arrivals a second must be a positive number")
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def drive(
    score: Callable[[int], object],
    requests: int | np.ndarray,
    clients: int = 1,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Requests:
    """Send requests and note the times; an error of the scorer ends it.

    A client takes the next request in line, waits until it is due, sends it, and waits for the answer: a queue of one
    line and as many servers as clients. One client runs in the calling thread.

    Args:
        score: called with the request's number, counted from 0.
        requests: how many, in a closed loop; or the times (N,) at which they are due, ascending, in an open loop.
        clients: how many threads send.
        now: the clock, in seconds.
        sleep: waits so many seconds of it.
    """
    due = None if isinstance(requests, int) else requests
    count = requests if isinstance(requests, int) else len(requests)
    times = np.zeros((3, count))
    line, failed = itertools.count(), threading.Event()
    begin = now()

    def client() -> None:
        # next() of itertools.count is one step of the interpreter: no two clients get the same request.
        while (k := next(line)) < count and not failed.is_set():
            if due is not None and (wait := due[k] - (now() - begin)) > 0:
                sleep(wait)
            start = now() - begin
            try:
                score(k)
            except BaseException:
                failed.set()
                raise
            times[:, k] = start if due is None else due[k], start, now() - begin

    if clients == 1:
        client()
    else:
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(client) for _ in range(clients)]:
                done.result()
    return Requests(*times)


def percentile(seconds: np.ndarray, quantile: float) -> float | None:
    """Return the quantile of (N,) seconds, linear between neighbours; None with fewer than ``TAIL`` beyond it."""
    # Rounded: 10,000 requests have ten beyond .999 whatever 1 - .999 is in binary.
    beyond = round(len(seconds) * (1 - quantile), 6)
    return float(np.quantile(seconds, quantile)) if beyond >= TAIL else None


def summary(turns: Sequence[Requests]) -> dict[str, float | int | dict[str, float | None] | None]:
    """Return what several turns of the same load say together; times in seconds.

    Returns:
        ``latency``: percentiles over the requests of all turns, None where they are too few, by ``QUANTILES``;
        ``spread``: p10 and p90 of the turns' own medians, None where there is one turn; ``median``: the median of these
        medians; ``service``: median and p99 of the scorer's own time; ``per_second``: the median turn's answers a
        second; ``requests``.
    """
    latency = np.concatenate([turn.latency for turn in turns])
    service = np.concatenate([turn.service for turn in turns])
    medians = [float(np.median(turn.latency)) for turn in turns]
    low, median, high = (float(value) for value in np.quantile(medians, [0.1, 0.5, 0.9]))
    return {
        "latency": {name: percentile(latency, quantile) for name, quantile in QUANTILES.items()},
        "median": median,
        "spread": {"p10": low, "p90": high} if len(turns) > 1 else None,
        "service": {"p50": float(np.median(service)), "p99": percentile(service, QUANTILES["p99"])},
        "per_second": float(np.median([turn.per_second for turn in turns])),
        "requests": len(latency),
    }
