"""Requests to stop that come close together."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ssr_rec.training import stall_watch
from ssr_rec.training.stall_watch import STOPS, stop_when_asked

INTERRUPTED = """
import itertools, os, signal, sys
from ssr_rec.training.stall_watch import STOPS, stop_when_asked

def interrupt(frame, event, argument):
    if frame.f_code.co_filename.endswith(("stall_watch.py", "threading.py")):
        if next(lines) == line:
            os.kill(os.getpid(), signal.SIGTERM)
        return interrupt

for line in range(30):
    for kind in STOPS:
        signal.signal(kind, signal.default_int_handler)
    lines = itertools.count()
    with stop_when_asked() as asked:
        sys.settrace(interrupt)
        os.kill(os.getpid(), signal.SIGINT)
        sys.settrace(None)
        assert asked()
print("always one request")
"""


@pytest.mark.faults
def test_a_request_at_any_line_of_the_handler_of_another_is_the_same_one():
    """A lock in the handler would hang here, as it once hung a run."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "always one request\n", done.stderr


@pytest.fixture
def handlers():
    before = {kind: signal.getsignal(kind) for kind in STOPS}
    for kind in STOPS:
        signal.signal(kind, signal.default_int_handler)
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def test_a_later_request_acts_as_before_and_the_same_one_never_does(handlers, monkeypatch):
    assert threading.current_thread() is threading.main_thread()
    with stop_when_asked() as asked:
        assert not asked()
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    with stop_when_asked() as asked:
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher's copy, when the checkpoint is written
    assert asked()
    monkeypatch.setattr(stall_watch, "SAME_REQUEST_S", 0.01)
    time.sleep(0.02)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
