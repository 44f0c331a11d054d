"""Load generation against queueing theory, a clock of its own, and a scorer that stalls."""

import threading
import time

import numpy as np
import pytest

from ssr_rec.serving.latency import Requests, drive, percentile, poisson_arrivals, summary


class Clock:
    """A time that passes only by sleeping and by being served."""

    def __init__(self) -> None:
        self.time = 5.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def drive(self, service: np.ndarray, requests: int | np.ndarray) -> Requests:
        return drive(lambda k: self.sleep(service[k]), requests, now=self.now, sleep=self.sleep)


def test_arrivals_are_a_poisson_process_of_the_rate_and_the_seed() -> None:
    arrivals = poisson_arrivals(200.0, 100_000, 7)
    gaps = np.diff(arrivals)
    assert gaps.min() > 0 and arrivals[0] > 0
    # The mean of n exponentials has a deviation of 1 / sqrt(n); their deviation equals their mean.
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.02)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.02
    assert np.array_equal(arrivals, poisson_arrivals(200.0, 100_000, 7))
    assert not np.array_equal(arrivals, poisson_arrivals(200.0, 100_000, 8))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate="):
        poisson_arrivals(rate, 10, 0)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_open_loop_waits_as_the_m_d_1_queue_does(load: float) -> None:
    service, count = 0.004, 400_000
    arrivals = poisson_arrivals(load / service, count, 3)
    done = Clock().drive(np.full(count, service), arrivals)
    # Pollaczek and Khinchine: the mean wait of Poisson arrivals at one server of constant service time.
    assert (done.latency - service).mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)
    assert np.allclose(done.service, service)


def test_open_loop_waits_as_lindley_says() -> None:
    rng = np.random.default_rng(0)
    service, arrivals = rng.exponential(0.01, 500), np.cumsum(rng.exponential(0.012, 500))
    latency, free = [], 0.0
    for arrival, taken in zip(arrivals, service, strict=True):
        free = max(free, arrival) + taken
        latency.append(free - arrival)
    done = Clock().drive(service, arrivals)
    assert np.allclose(done.latency, latency)
    assert np.allclose(done.due, arrivals)
    assert done.per_second == pytest.approx(500 / (free - arrivals[0]))


def test_one_stall_shows_in_the_open_loop_and_hides_in_the_closed_one() -> None:
    """Coordinated omission: 2,000 requests due at 500 a second, of 1 ms each, but for one of .2 s."""
    service = np.full(2_000, 0.001)
    service[1_000] = 0.2
    open_p99 = percentile(Clock().drive(service, poisson_arrivals(500.0, 2_000, 0)).latency, 0.99)
    closed = Clock().drive(service, 2_000)
    assert open_p99 is not None and open_p99 > 0.1
    assert percentile(closed.latency, 0.99) == pytest.approx(0.001)
    assert closed.per_second == pytest.approx(2_000 / service.sum())


def test_real_time_open_loop_starts_when_due_and_counts_the_line() -> None:
    due = np.array([0.0, 0.01, 0.02, 0.15])
    done = drive(lambda k: time.sleep(0.04), due)
    # Each takes 40 ms; the second and third are due while others are served.
    assert np.all(done.latency > [0.04, 0.07, 0.1, 0.04])
    assert np.all(done.started >= due)
    assert done.latency[3] < 0.1


def test_clients_are_servers_of_one_line() -> None:
    together, most, lock, seen = 0, 0, threading.Lock(), []

    def score(k: int) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
            seen.append(k)
        time.sleep(0.01)
        with lock:
            together -= 1

    done = drive(score, 30, clients=3)
    assert most == 3 and sorted(seen) == list(range(30))
    assert np.all(done.due == done.started) and np.all(done.latency > 0.01)
    queued = drive(score, np.zeros(6), clients=3)
    assert np.all(queued.latency > 0.009) and np.all(np.sort(queued.latency)[3:] > 0.019)


@pytest.mark.parametrize("clients", [1, 3])
def test_an_error_of_the_scorer_ends_the_run(clients: int) -> None:
    calls = []

    def score(k: int) -> None:
        calls.append(k)
        if k == 4:
            raise OSError("gone")
        time.sleep(0.001)

    with pytest.raises(OSError, match="gone"):
        drive(score, 1_000, clients=clients)
    assert len(calls) < 100


def test_a_percentile_needs_requests_beyond_it() -> None:
    rng = np.random.default_rng(1)
    seconds = rng.exponential(1.0, 10_000)
    ordered = np.sort(seconds)
    assert percentile(seconds, 0.999) == pytest.approx(ordered[9989] + 0.001 * (ordered[9990] - ordered[9989]))
    assert percentile(seconds[:9_999], 0.999) is None
    assert percentile(seconds[:1_000], 0.99) is not None and percentile(seconds[:999], 0.99) is None
    assert percentile(seconds[:20], 0.5) == pytest.approx(np.sort(seconds[:20])[9:11].mean())
    assert percentile(seconds[:19], 0.5) is None


def test_summary_is_over_all_requests_and_its_spread_over_turns() -> None:
    turns = []
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0):
        due = np.arange(400) * 10.0
        turns.append(Requests(due, due + 1, due + 1 + scale * np.linspace(0, 1, 400)))
    result = summary(turns)
    every = np.concatenate([1 + scale * np.linspace(0, 1, 400) for scale in (1, 2, 3, 4, 5)])
    assert result["latency"]["p50"] == pytest.approx(np.percentile(every, 50))
    assert result["latency"]["p99"] == pytest.approx(np.percentile(every, 99))
    assert result["latency"]["p99.9"] is None
    assert result["median"] == pytest.approx(2.5)
    assert result["spread"] == pytest.approx({"p10": 1.7, "p90": 3.3})
    assert result["service"]["p50"] == pytest.approx(np.percentile(every - 1, 50))
    assert result["requests"] == 2_000
    assert result["per_second"] == pytest.approx(400 / (3990 + 1 + 3))
    assert summary(turns[:1])["spread"] is None
