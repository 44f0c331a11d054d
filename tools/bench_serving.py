"""Measure the HTTP server of an artifact from another process; see docs/serving.md.

python tools/bench_serving.py artifacts/ssr_s --data data/kuairand --rows 200 --forms arrow json --batching on off --picture p.png

Each case has a server of its own. A closed loop finds what it can do; then an open loop sends Poisson arrivals at shares of that, and a
request's latency counts from when it was due.
"""  # noqa: E501

from __future__ import annotations

from ssr_rec.common.versions import require_stack

require_stack()

import argparse
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from inference_cases import read_rows
from inference_raw import raw_rows
from matplotlib.figure import Figure

from ssr_rec.common.errors import UserError
from ssr_rec.common.logs import quiet
from ssr_rec.data.schema import Schema
from ssr_rec.runs.curves import COLORS, DPI, MARKERS, lay_grid
from ssr_rec.runs.provenance import git_commit, hardware, versions
from ssr_rec.runs.table import markdown_table
from ssr_rec.serving.latency import Requests, drive, poisson_arrivals, summary
from ssr_rec.serving.scorer import Scorer, load
from ssr_rec.serving.server_requests import ARROW, JSON
from ssr_rec.serving.user_once import encode_user_once

Record = dict[str, Any]
FORMS = ("json", "arrow", "user")
BODIES = 32
"""Different requests, sent in turn."""
START_S = 180


def bodies(scorer: Scorer, options: argparse.Namespace, form: str) -> list[bytes]:
    """Return requests of rows of the test fold; of ``user``, the columns of the first row are those of all."""
    schema = Schema.read(options.data).select(scorer.schema.feature_names, scorer.labels)
    rows = read_rows(options.data, schema, options.rows * BODIES)
    if len(rows) < options.rows:
        raise UserError(f"--rows {options.rows}: the test fold has {len(rows)}")
    last = len(rows) - options.rows
    made = []
    for start in {last * i // (BODIES - 1) for i in range(BODIES)}:
        found = raw_rows(schema, options.artifact, rows, start, start + options.rows)
        if form == "arrow":
            sink = pa.BufferOutputStream()
            table = pa.Table.from_pylist(found)
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            made.append(sink.getvalue().to_pybytes())
        elif form == "json":
            made.append(json.dumps({"rows": found}).encode())
        else:
            user = {name: found[0][name] for name in options.user_columns}
            own = [{name: value for name, value in row.items() if name not in user} for row in found]
            made.append(json.dumps({"user": user, "candidates": own}).encode())
    return made


@contextmanager
def serving(options: argparse.Namespace, batching: str) -> Iterator[int]:
    """Yield the port of a server process, stopped at the end by SIGTERM."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(options.artifact), "--port", str(port)]
    command += ["--workers", str(options.workers), "--timeout-s", str(options.timeout_s)]
    command += ["--queue-rows", str(options.queue_rows), *(["--batch-rows", "1"] if batching == "off" else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_ready(process, port)
        yield port
    finally:
        process.terminate()
        process.communicate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[Any], port: int) -> None:
    """Wait for a server.

    Raises:
        UserError: it ended, or takes too long.
    """
    until = time.monotonic() + START_S
    while not is_ready(port):
        if process.poll() is not None or time.monotonic() > until:
            written = process.stderr.read() if process.stderr and process.poll() is not None else ""
            raise UserError(f"the server did not start: {written[-500:]}")
        time.sleep(0.2)


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Client:
    """Sends requests, one connection a thread, and notes each one's status."""

    def __init__(self, port: int, requests: Sequence[bytes], form: str) -> None:
        self.port, self.requests, self.kind = port, requests, ARROW if form == "arrow" else JSON
        self.statuses: dict[int, int] = {}
        self._own = threading.local()

    def __call__(self, number: int) -> None:
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = self.requests[number % len(self.requests)]
        try:
            self._own.connection.request("POST", "/predict", body, {"content-type": self.kind})
            answer = self._own.connection.getresponse()
            answer.read()
        except OSError as error:
            raise UserError(f"request {number} was not answered: {error!r}") from None
        self.statuses[number] = answer.status


def measured(client: Client, requests: int | np.ndarray, clients: int) -> Record:
    """Return the percentiles of the requests that were answered, and how many were refused."""
    found = drive(client, requests, clients)
    good = np.array([client.statuses[number] == 200 for number in range(len(found.due))])
    refused = {str(status): list(client.statuses.values()).count(status) for status in set(client.statuses.values())}
    if not good.any():
        return {"latency": None, "per_second": 0.0, "requests": 0, "statuses": refused}
    kept = Requests(found.due[good], found.started[good], found.ended[good])
    late = float(np.quantile(found.started - found.due, 0.99))
    return {**summary([kept]), "statuses": refused, "client_wait_p99": late}


def bare(scorer: Scorer, requests: Sequence[bytes], form: str, seconds: float) -> Record:
    """Return what the scorer takes for the same rows without a server, from values in memory."""
    if form == "arrow":
        rows: list[Any] = [pa.ipc.open_stream(body).read_all() for body in requests]
    else:
        found = [json.loads(body) for body in requests]
        rows = [one.get("rows", one) for one in found]

    def score(number: int) -> None:
        one = rows[number % len(rows)]
        if form == "user":
            scorer.predict_encoded(encode_user_once(scorer.encoder, one["user"], one["candidates"]))
        else:
            scorer.predict(one)

    turns = drive(score, 20)
    return summary([drive(score, max(20, int(seconds * turns.per_second)))])


def measure(options: argparse.Namespace) -> list[Record]:
    scorer = load(options.artifact)
    torch.set_num_threads(1)
    records: list[Record] = []
    for form in options.forms:
        requests = bodies(scorer, options, form)
        alone = bare(scorer, requests, form, options.seconds)
        records.append({"form": form, "batching": "-", "loop": "scorer alone", "load": None, **alone})
        for batching in options.batching:
            print(f"{form}, batching {batching}", file=sys.stderr, flush=True)
            with serving(options, batching) as port:
                drive(Client(port, requests, form), 20, options.clients)
                pilot = drive(Client(port, requests, form), 50, options.clients)
                count = max(50, int(options.seconds * pilot.per_second))
                closed = measured(Client(port, requests, form), count, options.clients)
                common = {"form": form, "batching": batching}
                records.append({**common, "loop": "closed", "load": None, **closed})
                for share in options.load:
                    rate = share * closed["per_second"]
                    arrivals = poisson_arrivals(
                        rate, max(50, round(rate * options.seconds)), [options.seed, round(share * 1000)]
                    )
                    open_loop = measured(Client(port, requests, form), arrivals, options.connections)
                    records.append({**common, "loop": "open", "load": share, "asked_per_s": rate, **open_loop})
    return records


def table(records: Sequence[Record]) -> str:
    header = [
        "form",
        "batching",
        "loop",
        "load",
        "asked/s",
        "answers/s",
        "p50 ms",
        "p90",
        "p99",
        "p99.9",
        "answered",
        "refused",
    ]
    lines = []
    for record in records:
        line = [record["form"], record["batching"], record["loop"], f"{record['load']:g}" if record["load"] else "-"]
        line += [f"{record['asked_per_s']:.1f}" if record["load"] else "-", f"{record['per_second']:.1f}"]
        latency = record["latency"] or {}
        for name in ("p50", "p90", "p99", "p99.9"):
            line.append("n/a" if latency.get(name) is None else f"{1000 * latency[name]:.1f}")
        refused = {status: count for status, count in record.get("statuses", {}).items() if status != "200"}
        line += [
            str(record["requests"]),
            ", ".join(f"{count}x {status}" for status, count in sorted(refused.items())) or "-",
        ]
        lines.append(line)
    return markdown_table(header, lines)


def draw(records: Sequence[Record], rows: int, path: Path) -> None:
    """Draw latency against what was asked for, and answers against it, as a PNG."""
    figure = Figure(figsize=(12, 5), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    cases = list(dict.fromkeys((r["form"], r["batching"]) for r in records if r["loop"] == "open"))
    for number, (form, batching) in enumerate(cases):
        own = [r for r in records if (r["form"], r["batching"], r["loop"]) == (form, batching, "open")]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        for name, line in (("p50", "-"), ("p99", ":")):
            points = [(r["asked_per_s"], 1000 * r["latency"][name]) for r in own if r["latency"] and r["latency"][name]]
            if points:
                label = f"{form}, batching {batching}" if name == "p50" else None
                left.plot(*zip(*points, strict=True), linestyle=line, label=label, **style)
        right.plot([r["asked_per_s"] for r in own], [r["per_second"] for r in own], **style)
    left.set_yscale("log")
    left.set_title(f"{rows} rows a request: p50 (line) and p99 (dotted)", loc="left", fontsize=10)
    left.set_ylabel("latency, ms, from when a request was due")
    right.set_title("answers a second", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("requests a second, Poisson")
        lay_grid(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        if "user" in options.forms and not options.user_columns:
            raise UserError("--forms user: say with --user-columns which columns all candidates share")
        if options.picture is not None and not options.picture.parent.is_dir():
            raise UserError(f"--picture {options.picture}: there is no folder {options.picture.parent}; make it first")
        records = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(records), end="\n\n")
    if options.picture is not None:
        draw(records, options.rows, options.picture)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    own = {"settings": settings, "commit": git_commit(), "hardware": hardware(), "versions": versions()}
    print(json.dumps({"loops": records, **own}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the HTTP server of an artifact from another process.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="prepared log, whose test fold the rows are of")
    parser.add_argument("--rows", type=int, default=200, help="of a request")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["arrow", "json"], help="user: user-once JSON")
    parser.add_argument("--user-columns", nargs="+", default=[], help="of --forms user: what all candidates share")
    parser.add_argument("--batching", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument(
        "--load", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0, 1.25], help="shares of the closed loop"
    )
    parser.add_argument("--clients", type=int, default=4, help="of the closed loop")
    parser.add_argument("--connections", type=int, default=64, help="of the open loop: requests that may be under way")
    parser.add_argument("--seconds", type=float, default=10.0, help="about so long is a step")
    parser.add_argument("--workers", type=int, default=1, help="of the server")
    parser.add_argument("--queue-rows", type=int, default=8192, help="of the server")
    parser.add_argument("--timeout-s", type=float, default=1.0, help="of the server")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--picture", type=Path, help="a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
