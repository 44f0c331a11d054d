"""Send a served artifact good and bad requests for a long time, and check every answer; see docs/serving.md.

python tools/soak_serving.py artifacts/monday --data data/kuairand --seconds 600 --user-columns user_id
python tools/soak_serving.py artifacts/monday --data data/kuairand --seconds 120 --swap artifacts/tuesday

First the whole test fold, each request alone: its probabilities must be those of Scorer.predict to the bit. Then several clients send
requests of one to eight rows, a share of them bad: each answer must be right within 1e-6 or a documented error. With --swap the served
link goes to the other artifact and back every second; an answer must be wholly of the model it names. The last line is JSON; exit 1 if anything was wrong.
"""  # noqa: E501

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from bench_serving import free_port, wait_until_ready
from inference_cases import read_rows
from inference_raw import raw_rows
from process_memory import resident

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.data.schema import Schema
from ssr_rec.serving.scorer import Scorer, load
from ssr_rec.serving.server import version_of
from ssr_rec.serving.server_requests import ARROW, JSON

NEAR = 1e-6
"""Probabilities of requests that are scored together may round otherwise."""
ERRORS = {400, 413, 415}
BUSY = {429, 503}
FOLD_ROWS = 200
GOOD = 400
"""Different good requests."""


class Sent(NamedTuple):
    kind: str
    body: bytes
    wanted: dict[str, dict[str, np.ndarray]] | None
    """Version -> label -> probabilities; None for a bad request."""


def arrow_body(rows: Sequence[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def good_request(form: str, rows: list[dict[str, Any]], scorers: Sequence[Scorer], user_columns: Sequence[str]) -> Sent:
    """Return a request of ``form``, arrow, json or user, and what each model says of it."""
    if form == "user":
        user = {name: rows[0][name] for name in user_columns}
        rows = [{**row, **user} for row in rows]
        own = [{name: value for name, value in row.items() if name not in user} for row in rows]
        body = json.dumps({"user": user, "candidates": own}).encode()
    else:
        body = arrow_body(rows) if form == "arrow" else json.dumps({"rows": rows}).encode()
    wanted = {version_of(scorer): scorer.predict(rows) for scorer in scorers}
    return Sent(ARROW if form == "arrow" else JSON, body, wanted)


def bad_request(draw: random.Random, good: Sent) -> Sent:
    """Return a request that is broken in one of many ways."""
    body = bytearray(good.body)
    way = draw.randrange(6)
    if way == 0:
        return Sent(draw.choice(["text/plain", "application/x-pickle", ""]), good.body, None)
    if way == 1:
        return Sent(good.kind, good.body[: draw.randrange(len(body))], None)
    if way == 2:
        for _ in range(draw.choice([1, 3, 20])):
            body[draw.randrange(len(body))] = draw.randrange(256)
        return Sent(good.kind, bytes(body), None)
    if way == 3:
        return Sent(
            JSON, draw.choice([b"[" * 5_000, b'{"rows": [{}]} x', b'{"rows": 1}', b"{}", b"", b"\xff\xfe"]), None
        )
    if way == 4:
        value = draw.choice(
            [b'{"a": 1}', b"[[1]]", b"1e400", b"NaN", b'"\\ud800"', b"9" * 60, b'"' + b"x" * 9_000 + b'"']
        )
        column = draw.choice([b"user_id", b"video_duration", b"watch_history", b"no_column"])
        return Sent(JSON, b'{"rows": [{"' + column + b'": ' + value + b"}]}", None)
    return Sent(ARROW if good.kind == JSON else JSON, good.body, None)


class Checker:
    """Counts answers and keeps what is wrong with some of them."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.rounded, self.wrong = 0, Counter[str]()
        self._lock = threading.Lock()

    def check(self, sent: Sent, status: int, headers: dict[str, str], body: bytes) -> None:
        """Compare an answer with what it must be."""
        problem, rounded = self._problem(sent, status, headers, body)
        with self._lock:
            self.statuses[status] += 1
            self.versions[headers.get("x-model", "none")] += 1
            self.rounded += rounded
            if problem:
                self.wrong[problem] += 1

    def _problem(self, sent: Sent, status: int, headers: dict[str, str], body: bytes) -> tuple[str, bool]:
        if status in BUSY:
            return "", False
        if status != 200:
            if sent.wanted is not None or status not in ERRORS:
                return f"a {'good' if sent.wanted else 'bad'} request was answered {status}: {body[:200]!r}", False
            return ("" if json.loads(body).keys() == {"error"} else f"no error message: {body[:200]!r}"), False
        if sent.wanted is None:
            return "", False  # what was changed still says something
        wanted = sent.wanted.get(headers["x-model"])
        if wanted is None:
            return f"an answer of an unknown model {headers['x-model']}", False
        found = probabilities_of(sent.kind, body)
        if found.keys() != wanted.keys() or any(len(found[name]) != len(wanted[name]) for name in wanted):
            return "an answer with other tasks or rows", False
        worst = max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)
        return ("" if worst <= NEAR else f"wrong by {worst:.1e}"), worst > 0


def probabilities_of(kind: str, body: bytes) -> dict[str, np.ndarray]:
    """Return task -> probabilities (B,) float32 of an answer."""
    if kind == ARROW:
        table = pa.ipc.open_stream(body).read_all()
        return {name.removeprefix("p_"): table[name].to_numpy() for name in table.column_names}
    found = json.loads(body)["probabilities"]
    return {name: np.array(values, np.float32) for name, values in found.items()}


class Client:
    """Sends requests on one connection, opened again where the server closes it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def send(self, sent: Sent) -> tuple[int, dict[str, str], bytes]:
        for attempt in (0, 1):
            try:
                self.connection.request("POST", "/predict", sent.body, {"content-type": sent.kind})
                answer = self.connection.getresponse()
                return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                # A server may close an idle connection as a request is on its way; twice in turn is a failure.
                self.connection.close()
                if attempt:
                    raise
        raise AssertionError


def check_fold(scorer: Scorer, rows: Sequence[dict[str, Any]], port: int) -> dict[str, int]:
    """Send the whole test fold in both forms, one request at a time; return how many values were not equal."""
    client = Client(port)
    counts = Counter({"rows": len(rows), "values": 0, "different": 0})
    for start in range(0, len(rows), FOLD_ROWS):
        found = list(rows[start : start + FOLD_ROWS])
        for form in ("json", "arrow"):
            sent = good_request(form, found, [scorer], ())
            status, _, body = client.send(sent)
            if status != 200:
                raise UserError(f"row {start} of the test fold: {status} {body[:200]!r}")
            (wanted,) = (sent.wanted or {}).values()
            for name, values in probabilities_of(sent.kind, body).items():
                counts["values"] += len(values)
                counts["different"] += int((values.view(np.int32) != wanted[name].view(np.int32)).sum())
    return dict(counts)


@contextmanager
def serving(options: argparse.Namespace, link: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Yield port and process of a server."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(link), "--port", str(port)]
    command += ["--timeout-s", "30", "--reload-s", "0.2" if options.swap else "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_ready(process, port)
            yield port, process
        finally:
            process.terminate()


def soak(options: argparse.Namespace, requests: Sequence[Sent], port: int, process: int, link: Path) -> dict[str, Any]:
    """Send until the time is over; return counts, memory and what was wrong."""
    checker, ended, begin = Checker(), threading.Event(), time.monotonic()

    def client(seed: int) -> None:
        draw, own = random.Random(seed), Client(port)
        while not ended.is_set():
            sent = draw.choice(requests)
            sent = bad_request(draw, sent) if draw.random() < options.bad else sent
            try:
                checker.check(sent, *own.send(sent))
            except (OSError, http.client.HTTPException) as error:
                checker.wrong[f"no answer: {error!r}"[:200]] += 1

    memory, swaps = [], 0
    with ThreadPoolExecutor(options.clients) as pool:
        clients = [pool.submit(client, options.seed * 1000 + number) for number in range(options.clients)]
        while time.monotonic() < begin + options.seconds and not any(one.done() for one in clients):
            time.sleep(1)
            memory.append(resident(process)["now"])
            if options.swap:
                swaps += 1
                point(link, options.swap if swaps % 2 else options.artifact)
        ended.set()
    for one in clients:
        one.result()
    tenth = max(1, len(memory) // 10)
    early, late = (float(np.median(part)) for part in (memory[tenth : 2 * tenth] or memory, memory[-tenth:]))
    return {
        "requests": checker.statuses.total(),
        "seconds": round(time.monotonic() - begin, 1),
        "statuses": {str(status): count for status, count in sorted(checker.statuses.items())},
        "models": dict(checker.versions),
        "rounded_otherwise": checker.rounded,
        "swaps": swaps,
        "memory_mb": {"second_tenth": early / 2**20, "last_tenth": late / 2**20, "growth": late / early - 1},
        "wrong": dict(checker.wrong.most_common(10)),
    }


def point(link: Path, artifact: Path) -> None:
    """Make ``link`` one to ``artifact``, in one step."""
    new = link.with_suffix(".new")
    new.symlink_to(artifact.resolve())
    os.replace(new, link)


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)  # as the server's; beside it, threads that wait for one another spin
    scorers = [load(artifact) for artifact in (options.artifact, options.swap) if artifact]
    schema = Schema.read(options.data).select(scorers[0].schema.feature_names, scorers[0].labels)
    stored = read_rows(options.data, schema, 2**62)
    rows = raw_rows(schema, options.artifact, stored, 0, len(stored))
    draw = random.Random(options.seed)
    forms = ["arrow", "json", *(["user"] if options.user_columns else [])]
    requests = []
    for number in range(GOOD):
        start = draw.randrange(len(rows) - 8)
        found = rows[start : start + draw.randrange(1, 9)]
        requests.append(good_request(forms[number % len(forms)], found, scorers, options.user_columns))
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "live"
        point(link, options.artifact)
        with serving(options, link) as (port, process):
            fold = None if options.swap else check_fold(scorers[0], rows, port)
            record = soak(options, requests, port, process.pid, link)
    return {"fold": fold, **record}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 for a wrong answer, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        record = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record))
    return int(bool(record["wrong"]) or bool(record["fold"] and record["fold"]["different"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Send a served artifact good and bad requests, and check each answer.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="prepared log, whose test fold the rows are of")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--bad", type=float, default=0.2, help="share of requests that are broken")
    parser.add_argument("--swap", type=Path, help="an artifact of the same dataset to serve in turn, every second")
    parser.add_argument("--user-columns", nargs="+", default=[], help="send user-once requests too; what rows share")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
