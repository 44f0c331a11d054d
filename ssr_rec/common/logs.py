"""Prints lines for people: module loggers say them, and a run prints them once, whatever the number of ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

ROOT = "ssr_rec"
"""Name of the logger above all of the package's."""


class _To(logging.Handler):
    def __init__(self, write: Callable[[str], None], warn: Callable[[str], None]) -> None:
        super().__init__()
        self.write, self.warn = write, warn

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on the message alone: a progress line has no use for names and levels."""
        (self.warn if record.levelno >= logging.WARNING else self.write)(record.getMessage())


def send_logs(write: Callable[[str], None] | None, warn: Callable[[str], None] | None = None) -> None:
    """Send what the package's loggers say from INFO on to ``write``, a rank's progress line; None: to nobody special.

    Args:
        warn: takes warnings and errors; None: ``write``.

    Each rank says everything; the progress line of rank 0 alone prints.
    """
    logger = logging.getLogger(ROOT)
    logger.handlers = [] if write is None else [_To(write, warn or write)]
    logger.propagate = write is None
    logger.setLevel(logging.NOTSET if write is None else logging.INFO)


def _says_something(record: logging.LogRecord) -> bool:
    """Return whether a line of the root logger, which TorchRec's planner uses, is more than chatter.

    It warns of every table that is kept whole on every rank, as such a table has no sharding to check.
    """
    return not record.getMessage().startswith("Sharding spec not found for ")


def quiet() -> None:
    """Keep the libraries' start-up chatter out of the progress lines, and other ranks' lines out of rank 0's."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_says_something)
    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger(ROOT).setLevel(logging.ERROR)
