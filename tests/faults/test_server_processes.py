"""The server's processes: one that is killed comes back while the others serve, and a polite stop loses no answer."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ssr_rec.serving.export import Compared, export_run
from tests.made_run import make_run

pytestmark = pytest.mark.faults
ROWS = [{"user": n % 50, "item": n % 30, "price": n % 8, "history": [1, 2], "tags": []} for n in range(4_000)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder / "run", dataset, ["--over_arch.num_views=2", "--over_arch.view_dim=8"])
    export_run(run, folder / "artifact", compared=Compared(rows=50))
    return folder / "artifact"


@pytest.fixture
def served(artifact: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "tools/serve.py", str(artifact), "--port", str(port), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--timeout-s", "60", "--queue-rows", "99999"],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: send(port, 1) == 200)
        yield process, port
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()
        process.wait()


def until(holds: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def send(port: int, rows: int) -> int | str:
    """The status of a request on a connection of its own, or the name of what became of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        body = json.dumps({"rows": ROWS[:rows]})
        connection.request("POST", "/predict", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status if len(json.loads(answer.read())["probabilities"]["click"]) == rows else "wrong"
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


def servers(process: subprocess.Popen[bytes]) -> set[int]:
    found = set()
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it may have ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def connections(process: subprocess.Popen[bytes]) -> int:
    """How many the servers have accepted and not yet closed."""
    children = [child for child in psutil.Process(process.pid).children() if child.pid in servers(process)]
    return sum(one.status == psutil.CONN_ESTABLISHED for child in children for one in child.net_connections())


def test_a_killed_process_comes_back_while_the_other_serves(served):
    process, port = served
    until(lambda: len(servers(process)) == 2)
    before = servers(process)
    os.kill(min(before), signal.SIGKILL)
    time.sleep(0.5)
    assert [send(port, 3) for _ in range(50)] == [200] * 50
    until(lambda: len(servers(process)) == 2 and servers(process) != before)
    assert [send(port, 3) for _ in range(20)] == [200] * 20


def test_a_polite_stop_answers_every_request_that_was_accepted(served):
    process, port = served
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(send, port, 4_000) for _ in range(12)]
        # A connection that its client has closed is not counted twice.
        until(lambda: sum(answer.done() for answer in answers) + connections(process) == 12)
        time.sleep(0.5)  # a connection is accepted before its request is, which is what is promised
        process.send_signal(signal.SIGTERM)
        found = [answer.result() for answer in answers]
    assert process.wait(60) == 0
    assert found == [200] * 12
    assert send(port, 1) == "ConnectionRefusedError"
