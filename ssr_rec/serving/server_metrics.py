"""Counts what a server does, in Prometheus' form, over all of its processes."""

from __future__ import annotations

import os
import time
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from ssr_rec.serving.value_shares import ValueShares

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which prometheus_client shares counts between processes."""
SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
KINDS = ("total", "missing", "oov")
EVERY_S = 1.0
"""So often the counts of values are told."""


class ServerMetrics:
    """Holds the metrics of a process; an app has its own, so that several may stand in one process."""

    def __init__(self) -> None:
        kept = self._registry = CollectorRegistry()
        self.requests = Counter("ssr_rec_requests", "Requests by HTTP status.", ["status"], registry=kept)
        self.seconds = Histogram(
            "ssr_rec_request_seconds", "From the body's last byte to the answer.", buckets=SECONDS, registry=kept
        )
        self.batch_rows = Histogram(
            "ssr_rec_batch_rows", "Rows that were scored together.", buckets=ROWS, registry=kept
        )
        self.batch_requests = Histogram(
            "ssr_rec_batch_requests", "Requests that were scored together.", buckets=ROWS, registry=kept
        )
        self.queue_rows = Gauge(
            "ssr_rec_queue_rows", "Rows that wait, of all processes.", multiprocess_mode="livesum", registry=kept
        )
        self._values = Counter(
            "ssr_rec_values",
            "Values by feature: total, and of them missing and oov.",
            ["feature", "kind"],
            registry=kept,
        )
        self.models = Counter("ssr_rec_models", "Models: loaded, or refused.", ["outcome"], registry=kept)
        self._told: WeakKeyDictionary[ValueShares, dict[str, tuple[int, ...]]] = WeakKeyDictionary()
        self._next = 0.0

    def leave_out(self, values: ValueShares) -> None:
        """Count what a scorer has counted so far as told: another one answered those rows."""
        counts = values.counts().items()
        self._told[values] = {name: (found.total, found.missing, found.oov) for name, found in counts}

    def tell_values(self, values: ValueShares, now: bool = False) -> None:
        """Add what a scorer has counted since the last time, at most every ``EVERY_S`` unless ``now``."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_S
        told = self._told.setdefault(values, {})
        for name, found in values.counts().items():
            counts = (found.total, found.missing, found.oov)
            before = told.get(name, (0, 0, 0))
            for kind, count, old in zip(KINDS, counts, before, strict=True):
                if count > old:
                    self._values.labels(name, kind).inc(count - old)
            told[name] = counts

    def text(self) -> bytes:
        """Return the page of metrics, of all processes where they share a folder."""
        registry = self._registry
        if os.environ.get(FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
