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

HAMMERED = """
import os, signal, time
from ssr_rec.training.stall_watch import STOPS, stop_when_asked

hammered = os.getpid()
if (hammer := os.fork()) == 0:
    while os.getppid() == hammered:
        for kind in STOPS * 3:
            os.kill(hammered, kind)
        time.sleep(3e-4)
for _ in range(400):
    for kind in STOPS:
        signal.signal(kind, signal.SIG_IGN)
    with stop_when_asked() as asked:
        while not asked():
            pass
for kind in STOPS:
    signal.signal(kind, signal.SIG_IGN)
os.kill(hammer, signal.SIGKILL)
print("all of them were one request")
"""


def test_signals_at_any_moment_of_one_anothers_handlers_are_one_request():
    """With a lock in the handler this hangs or is stopped by a ``KeyboardInterrupt``."""
    done = subprocess.run([sys.executable, "-c", HAMMERED], capture_output=True, text=True, timeout=100)
    assert done.stdout == "all of them were one request\n", done.stderr


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
