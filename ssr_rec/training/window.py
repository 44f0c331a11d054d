"""Collects the steps that one progress row tells of."""

from __future__ import annotations

import time

from torch import Tensor

from ssr_rec.data.reader import Prefetcher


class Window:
    """Holds the losses and the start of the steps since the last progress row."""

    def __init__(self, first_step: int, batches: Prefetcher) -> None:
        self.first_step, self.batches, self.samples = first_step, batches, 0
        self.losses: list[Tensor] = []
        self.clock, self.waited = time.perf_counter(), batches.wait_seconds
