"""The HTTP server: the same probabilities as the scorer, bad requests refused alone, nothing accepted is lost."""

from __future__ import annotations

import http.client
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import uvicorn

from ssr_rec.common.errors import UserError
from ssr_rec.serving import server
from ssr_rec.serving.artifact import Manifest
from ssr_rec.serving.export import export_run
from ssr_rec.serving.raw_rows import Encoder
from ssr_rec.serving.scorer import Scorer, load
from ssr_rec.serving.server_batcher import Batcher, TooLate, Waiting
from ssr_rec.serving.server_requests import ARROW, JSON
from ssr_rec.serving.server_settings import ServerSettings
from ssr_rec.serving.value_shares import ValueShares
from tests.cases import slow
from tests.made_run import make_run
from tests.odd_rows import odd_rows, prepared

PLAIN = ["number", "text", "flag", "hashed", "small", "price", "count", "last", "words", "codes"]


class SlowScorer(Scorer):
    """A scorer without a compiled program: a sum of sines of the ids, row by row."""

    def __init__(self, encoder: Encoder, schema: Any, bias: float = 0.0) -> None:
        self.encoder, self.schema, self.labels = encoder, schema, ["click", "buy"]
        self.values = ValueShares(schema.features, {})
        self.manifest = Manifest.model_construct(links={})
        self.bias = bias
        self.calls: list[int] = []
        self.begun = 0
        self.gate = threading.Event()
        self.gate.set()

    def score_arrays(
        self, ids: np.ndarray, lists: Any, of_rows: Any = None, dense: Any = None, weights: Any = None
    ) -> torch.Tensor:
        self.begun += 1
        self.gate.wait(20)
        self.calls.append(ids.shape[1])
        sums = np.sin(ids * np.arange(1, len(ids) + 1)[:, None]).sum(0)
        sums += self.bias
        for (values, offsets), rows in zip(lists, of_rows or [None] * len(lists), strict=True):
            of_lists = np.array([np.cos(values[a:b]).sum() for a, b in pairwise(offsets)])
            sums += of_lists if rows is None else of_lists[rows]
        return torch.from_numpy(np.stack([sums, -sums / 3], 1).astype(np.float32))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> SlowScorer:
    schema, folder, _ = prepared(tmp_path_factory.mktemp("odd"), pa.Table.from_pylist(odd_rows(2_000, seed=1)))
    return SlowScorer(Encoder(schema, folder), schema)


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def send(self, path: str, body: bytes | None = None, kind: str = JSON) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST" if body is not None else "GET", path, body, {"content-type": kind})
            answer = connection.getresponse()
            text, headers = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        if headers["content-type"] == ARROW:
            return answer.status, pa.ipc.open_stream(text).read_all(), headers
        return answer.status, json.loads(text) if headers["content-type"] == JSON else text.decode(), headers

    def predict(self, rows: Any, **others: Any) -> tuple[int, Any]:
        return self.send("/predict", json.dumps({"rows": rows, **others}).encode())[:2]

    def predict_arrow(self, table: pa.Table) -> tuple[int, Any]:
        return self.send("/predict", stream(table), ARROW)[:2]


@contextmanager
def running(app: Any) -> Iterator[tuple[Client, uvicorn.Server]]:
    listener = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not listener.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        yield Client(listener.servers[0].sockets[0].getsockname()[1]), listener
    finally:
        listener.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def wait_for_requests(listener: uvicorn.Server, count: int) -> None:
    """Until so many are in the server, however slow the machine."""
    wait_for(lambda: len(listener.server_state.tasks) >= count)


def listens(address: tuple[str, int]) -> bool:
    with socket.socket() as one:
        return one.connect_ex(address) == 0


@contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch, scorer: SlowScorer, **settings: Any
) -> Iterator[tuple[Client, uvicorn.Server]]:
    monkeypatch.setattr(server, "load", lambda _: scorer)
    monkeypatch.setattr(server, "version_of", lambda _: "0123456789ab")
    with running(server.make_app(ServerSettings(artifact="x", threads=2, **settings))) as found:
        yield found


def plain_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that JSON can say: no dates."""
    rows = odd_rows(count, seed)
    return [{k: row[k] for k in PLAIN if not (isinstance(row[k], float) and row[k] != row[k])} for row in rows]


def assert_bits(found: Any, wanted: dict[str, np.ndarray]) -> None:
    for label, values in wanted.items():
        mine = found["probabilities"][label] if isinstance(found, dict) else found[f"p_{label}"].to_numpy()
        assert np.array(mine, dtype=np.float32).tobytes() == values.tobytes()


def test_probabilities_are_those_of_the_scorer_to_the_bit(monkeypatch, scorer):
    rows = plain_rows(300, 7)
    table = pa.Table.from_pylist(odd_rows(300, 8))
    with serving(monkeypatch, scorer) as (client, _):
        for part in (rows, rows[:1], []):
            status, found = client.predict(part)
            assert status == 200 and found["model"] == "0123456789ab"
            assert_bits(found, scorer.predict(part))
        status, found = client.predict_arrow(table)
        assert status == 200 and found.column_names == ["p_click", "p_buy"]
        assert_bits(found, scorer.predict(table))
        assert client.send("/health")[:2] == (200, {"status": "alive"})
        assert client.send("/ready")[:2] == (200, {"status": "ready", "model": "0123456789ab"})
        paths = client.send("/openapi.json")[1]["paths"]
        assert set(paths) == {"/predict", "/health", "/ready", "/metrics"}


def test_user_once_is_the_flat_request(monkeypatch, scorer):
    user = {name: value for name, value in plain_rows(1, 3)[0].items() if name in ("number", "text", "words", "codes")}
    own = [{k: v for k, v in row.items() if k not in user} for row in plain_rows(50, 4)]
    with serving(monkeypatch, scorer) as (client, _):
        for candidates in (own, own[:1], []):
            body = {"user": user, "candidates": candidates}
            status, found, _ = client.send("/predict", json.dumps(body).encode())
            assert status == 200
            assert_bits(found, scorer.predict([{**user, **candidate} for candidate in candidates]))
        twice = json.dumps({"user": user, "candidates": [own[0], {"number": 1}]}).encode()
        status, found, _ = client.send("/predict", twice)
        assert status == 400 and "row 1: 'number' is given for the user and for the candidate" in found["error"]
        wrong = json.dumps({"user": {"text": [1]}, "candidates": own}).encode()
        assert "user: feature 'text' holds a list" in client.send("/predict", wrong)[1]["error"]


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def broken_offsets(table: pa.Table) -> bytes:
    """An IPC stream whose text column says that it ends far beyond the body."""
    place = table.column_names.index("text")
    written = stream(table.slice(0, 2).set_column(place, "text", pa.array(["abcdefghijk", "mno"])))
    offsets = np.array([0, 11, 14], np.int32).tobytes()
    assert written.count(offsets) == 1
    return written.replace(offsets, np.array([0, 11, 2**30], np.int32).tobytes())


def test_what_is_no_request_is_refused_by_name(monkeypatch, scorer):
    table = pa.Table.from_pylist(odd_rows(5, seed=2))
    dictionary = table.set_column(table.column_names.index("text"), "text", table["text"].dictionary_encode())
    zstd = pa.ipc.IpcWriteOptions(compression="zstd")
    with serving(monkeypatch, scorer, max_bytes=50_000, max_rows=20) as (client, _):
        for body, status, message in [
            (b"{", 400, "not JSON"),
            (b"[" * 20_000, 400, "nested too deep"),
            (b'{"rows": [{"price": NaN}]}', 400, "NaN is no JSON"),
            (b'{"rows": {}}', 400, "rows: must be a list"),
            (b'{"rows": [{}, 7]}', 400, "rows: row 1 is not an object"),
            (b'{"rows": [], "model": "/etc/passwd"}', 400, "a request is"),
            (b'{"rows": [{}, {"price": "12"}]}', 400, "row 1: feature 'price' holds the str '12', not a number"),
            (b'{"rows": [{"codes": [1, [2]]}]}', 400, "row 0: feature 'codes' holds a list"),
            (b'{"rows": [' + b"{}," * 20 + b"{}]}", 413, "21 rows: a request has at most 20"),
            (b" " * 50_001, 413, "50001 bytes"),
            (b"\xff", 400, "not JSON"),
        ]:
            found_status, found, _ = client.send("/predict", body)
            assert (found_status, message in found["error"]) == (status, True), (body[:50], found)
        for body, message in [
            (b"", "not an Arrow IPC stream"),
            (b"\xff\xff\xff\xff" + b"\x10\0\0\0" + b"\xff" * 60, "not an Arrow IPC stream"),
            (stream(table, options=zstd), "compressed buffers are refused"),
            (stream(dictionary), "column 'text' holds dictionary"),
            (broken_offsets(table), "not an Arrow IPC stream"),
            (stream(table).replace(b"price", b"pric\xe9"), "not an Arrow IPC stream"),
        ]:
            status, found, _ = client.send("/predict", body, ARROW)
            assert (status, message in found["error"]) == (400, True), (message, found)
        status, found = client.predict_arrow(table.drop(["price"]))
        assert status == 400 and "no column 'price'" in found["error"]
        assert client.send("/predict", b"x", "text/plain")[0] == 415
        assert client.predict([{}])[0] == 200, "it still serves"


def test_waiting_requests_are_scored_together_and_a_bad_one_alone_is_refused(monkeypatch, scorer):
    rows = plain_rows(60, 9)
    parts: list[Any] = [rows[start : start + 3] for start in range(0, 60, 3)]
    parts[7] = [*parts[7][:2], {"price": "dear"}]
    with serving(monkeypatch, scorer, batch_rows=32, timeout_s=20.0) as (client, listener):
        scorer.calls.clear()
        scorer.gate.clear()
        with ThreadPoolExecutor(20) as pool:
            answers = [pool.submit(client.predict, part) for part in parts]
            wait_for_requests(listener, len(parts))
            time.sleep(0.2)
            scorer.gate.set()
            found = [answer.result() for answer in answers]
    assert found[7][0] == 400 and "row 2: feature 'price' holds the str 'dear'" in found[7][1]["error"]
    for number, (status, answer) in enumerate(found):
        if number != 7:
            assert status == 200
            # Vector instructions round the last rows of a batch otherwise.
            for label, values in scorer.predict(parts[number]).items():
                np.testing.assert_allclose(answer["probabilities"][label], values, atol=1e-6, rtol=0)
    batches = scorer.calls[: -len(parts) + 1]
    assert sum(batches) == 57 and max(batches) > 3 and max(batches) <= 32 and len(batches) < 10, batches


def test_a_full_queue_is_429_and_a_late_answer_503(monkeypatch, scorer):
    with serving(monkeypatch, scorer, queue_rows=4, timeout_s=2.0) as (client, _):

        def rows_waiting() -> float:
            lines = client.send("/metrics")[1].splitlines()
            return float(next(line.split()[1] for line in lines if line.startswith("ssr_rec_queue_rows ")))

        scorer.gate.clear()
        begun = scorer.begun
        with ThreadPoolExecutor(12) as pool:
            first = pool.submit(client.predict, [{}])
            wait_for(lambda: scorer.begun == begun + 1)
            waiting = [pool.submit(client.predict, [{}, {}]) for _ in range(2)]
            wait_for(lambda: rows_waiting() == 4)
            refused = [pool.submit(client.send, "/predict", b'{"rows": [{}]}') for _ in range(3)]
            for status, found, headers in [answer.result() for answer in refused]:
                assert status == 429 and "retry-after" in headers and "too many rows wait" in found["error"]
            time.sleep(2.0)
            scorer.gate.set()
            assert first.result()[0] == 200
            assert [answer.result()[0] for answer in waiting] == [503, 503]
        assert client.predict([{}])[0] == 200


def test_a_request_that_nobody_waits_for_is_left_out_and_the_next_is_answered(scorer):
    batcher = Batcher(scorer, batch_rows=8, wait_s=0.0, queue_rows=64)
    rows, past = plain_rows(3, seed=5), time.monotonic() - 1
    scorer.gate.clear()
    first, gone, late, last = (
        Waiting(lambda scorer: scorer.encoder.encode(rows), len(rows), due)
        for due in (past + 60, past, past, past + 60)
    )
    try:
        batcher.submit(first)
        while batcher.rows_waiting:
            time.sleep(0.001)
        for request in (gone, late, last):
            batcher.submit(request)
        assert gone.answer.cancel()
    finally:
        scorer.gate.set()
    wanted = scorer.predict(rows)
    assert all((last.answer.result(20)[label] == wanted[label]).all() for label in wanted)
    assert isinstance(late.answer.exception(20), TooLate) and first.answer.result(20)
    batcher.close()


def test_a_stopped_server_answers_what_it_has_accepted(monkeypatch, scorer):
    rows = plain_rows(5, 1)
    with ThreadPoolExecutor(8) as pool, serving(monkeypatch, scorer, timeout_s=20.0) as (client, listener):
        scorer.gate.clear()  # now, as a model is warmed up before the server takes requests
        answers = [pool.submit(client.predict, rows) for _ in range(8)]
        wait_for_requests(listener, 8)
        address = listener.servers[0].sockets[0].getsockname()
        listener.should_exit = True
        wait_for(lambda: not listens(address))
        scorer.gate.set()
        for answer in answers:
            status, found = answer.result()
            assert status == 200
            for label, values in scorer.predict(rows).items():
                np.testing.assert_allclose(found["probabilities"][label], values, atol=1e-6, rtol=0)


def test_metrics_and_logs_say_what_happened_without_the_rows(monkeypatch, scorer, caplog):
    caplog.set_level("INFO", "ssr_rec.serving.server")
    with serving(monkeypatch, scorer) as (client, _):
        client.predict([{"text": "a secret"}, {}])
        client.predict([{"price": "a secret"}])
        scorer.values = ValueShares(scorer.schema.features, {})
        text = client.send("/metrics")[1]
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['ssr_rec_requests_total{status="200"}'] == lines['ssr_rec_requests_total{status="400"}'] == "1.0"
    assert lines["ssr_rec_batch_rows_sum"] == "2.0" and lines["ssr_rec_request_seconds_count"] == "2.0"
    assert lines["ssr_rec_queue_rows"] == "0.0"
    of_text = {kind: lines[f'ssr_rec_values_total{{feature="text",kind="{kind}"}}'] for kind in ("missing", "oov")}
    assert float(of_text["missing"]) >= 1 and float(of_text["oov"]) >= 1
    events = [json.loads(record.message) for record in caplog.records]
    assert [(event["status"], event["rows"]) for event in events] == [(200, 2), (400, 0)]
    assert "secret" not in caplog.text


def test_models_change_under_load_without_a_failed_or_mixed_answer(monkeypatch, scorer, tmp_path):
    """Every answer is wholly of the model that it names; a bad artifact changes nothing."""
    stamp = tmp_path / "artifact.json"
    stamp.write_text("0")
    rows = plain_rows(7, 5)
    opened: list[SlowScorer] = []

    def load_next(_: str) -> SlowScorer:
        if stamp.read_text() == "bad":
            raise UserError("damaged")
        opened.append(SlowScorer(scorer.encoder, scorer.schema, bias=float(len(opened))))
        return opened[-1]

    monkeypatch.setattr(server, "load", load_next)
    monkeypatch.setattr(server, "version_of", lambda one: str(one.bias))
    settings = ServerSettings(artifact=str(tmp_path), threads=2, reload_s=0.02, timeout_s=20.0)
    found: list[tuple[int, Any]] = []
    done = threading.Event()

    def ask(client: Client) -> None:
        while not done.is_set():
            found.append(client.predict(rows))

    with running(server.make_app(settings)) as (client, _), ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, client) for _ in range(4)]
        for number in range(6):
            time.sleep(0.2)
            new = tmp_path / "new"
            new.write_text("bad" if number == 3 else str(number))
            new.rename(stamp)
        time.sleep(0.3)
        done.set()
        for one in asking:
            one.result()
        metrics = client.send("/metrics")[1]
    versions = {answer["model"] for _, answer in found}
    assert {status for status, _ in found} == {200} and len(found) > 20 and len(versions) > 2
    assert 'ssr_rec_models_total{outcome="refused"} 1.0' in metrics
    for _, answer in found:
        wanted = next(one for one in opened if str(one.bias) == answer["model"]).predict(rows)
        for label, values in wanted.items():
            np.testing.assert_allclose(answer["probabilities"][label], values, atol=1e-6, rtol=0)
    assert all(not thread.name.startswith("scorer") for thread in threading.enumerate()), "old models are let go"


@pytest.mark.parametrize(
    ("new", "reason"),
    [slow((1e-3, None)), (3.0, "buy differs by 0."), ("fails", "it failed on a request"), slow((math.nan, "nan"))],
)
def test_a_new_model_is_tried_beside_the_old_one_before_it_takes_over(
    monkeypatch, scorer, tmp_path, caplog, new, reason
):
    caplog.set_level("INFO", "ssr_rec.serving.server")
    stamp, rows = tmp_path / "artifact.json", plain_rows(10, 5)
    stamp.write_text("0")
    opened: list[SlowScorer] = []

    def load_next(_: str) -> SlowScorer:
        bias = 0.0 if not opened else 1.0 if new == "fails" else new
        opened.append(SlowScorer(scorer.encoder, scorer.schema, bias))
        if opened[1:] and new == "fails":
            opened[1].labels = ["click"]
        return opened[-1]

    monkeypatch.setattr(server, "load", load_next)
    monkeypatch.setattr(server, "version_of", lambda one: str(opened.index(one)))
    monkeypatch.setattr(server, "warm_up", lambda one: None)
    limits = {"trial_rows": 200, "trial_share": 0.5, "trial_difference": 0.01}
    settings = ServerSettings(artifact=str(tmp_path), threads=2, reload_s=0.02, timeout_s=20.0, **limits)
    with running(server.make_app(settings)) as (client, _):
        (tmp_path / "new").write_text("1")
        (tmp_path / "new").rename(stamp)
        asked, until = 0, time.monotonic() + 20
        while "trial ended" not in caplog.text and "refused" not in caplog.text and time.monotonic() < until:
            status, answer = client.predict(rows)
            asked += len(rows)
            assert status == 200
            if answer["model"] == "0":
                assert_bits(answer, opened[0].predict(rows))
        time.sleep(0.2)
        assert client.predict(rows)[1]["model"] == ("1" if reason is None else "0")
        assert new == "fails" or asked > 210, "a share of the requests is tried"
        metrics = client.send("/metrics")[1]
    assert ('outcome="refused"' in metrics) == (reason is not None) and (reason or "") in caplog.text
    assert all(not thread.name.startswith("scorer") for thread in threading.enumerate())


def test_what_a_trial_scores_is_in_no_metric(monkeypatch, scorer, tmp_path):
    """Not while it goes on, nor when its model takes over: the old one has answered and counted those rows."""
    stamp, rows, opened = tmp_path / "artifact.json", plain_rows(5, 1), []

    def load_next(_: str) -> SlowScorer:
        opened.append(SlowScorer(scorer.encoder, scorer.schema))
        return opened[-1]

    monkeypatch.setattr(server, "load", load_next)
    monkeypatch.setattr(server, "version_of", lambda one: str(opened.index(one)))
    monkeypatch.setattr(server, "warm_up", lambda one: None)
    stamp.write_text("0")
    service = server.Service(ServerSettings(artifact=str(tmp_path), trial_rows=5))
    (tmp_path / "new").write_text("1")
    (tmp_path / "new").rename(stamp)
    service.refresh()
    assert service.trial is not None
    (model, trial), new = service.trial, opened[1]
    new.gate.clear()
    asked = [Waiting(lambda one: one.encoder.encode(rows), 5, time.monotonic() + 60) for _ in range(2)]
    model.batcher.submit(asked[0])
    wait_for(lambda: new.begun == 1)
    model.batcher.submit(asked[1])
    assert model.batcher.rows_waiting == 5 and "ssr_rec_queue_rows 0.0" in service.metrics.text().decode()
    new.gate.set()
    for one in asked:
        one.answer.result(60)
    trial.rows = 5
    service.refresh()
    assert service.model is model
    service.close()
    metrics = service.metrics.text().decode()
    assert "ssr_rec_batch_rows_count 0.0" in metrics and "ssr_rec_values_total{" not in metrics


def test_an_artifact_that_raises_anything_is_refused_and_the_watch_goes_on(monkeypatch, scorer, tmp_path, caplog):
    monkeypatch.setattr(server, "load", lambda _: scorer)
    monkeypatch.setattr(server, "version_of", lambda one: "0")
    service = server.Service(ServerSettings(artifact=str(tmp_path)))

    def load_bad(_: str) -> SlowScorer:
        raise KeyError("lists")

    monkeypatch.setattr(server, "load", load_bad)
    (tmp_path / "artifact.json").write_text("1")
    service.refresh()
    assert "model refused" in caplog.text and "lists" in caplog.text
    service.close()


@pytest.mark.slow
def test_schemathesis_finds_nothing(monkeypatch, scorer):
    pytest.importorskip("schemathesis")
    with serving(monkeypatch, scorer, max_rows=100) as (client, _):
        url = f"http://127.0.0.1:{client.port}/openapi.json"
        limits = ["--checks", "all", "--max-examples", "100", "--seed", "1"]
        command = [sys.executable, "-m", "schemathesis.cli", "run", url, *limits]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-5000:]
    assert "No issues found" in found.stdout


@pytest.mark.slow
def test_an_artifact_is_served_to_the_bit(tmp_path: Path, dataset: Path) -> None:
    run = make_run(tmp_path / "run", dataset, ["--over_arch.num_views=2", "--over_arch.view_dim=8"])
    export_run(run, tmp_path / "artifact")
    scorer = load(tmp_path / "artifact")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {
            "user": int(rng.integers(50)),
            "item": int(rng.integers(30)),
            "price": int(rng.integers(8)),
            "history": rng.integers(0, 30, rng.integers(0, 5)).tolist(),
            "tags": rng.integers(0, 12, rng.integers(0, 4)).tolist(),
        }
        for _ in range(200)
    ]
    with running(server.make_app(ServerSettings(artifact=str(tmp_path / "artifact")))) as (client, _):
        for part in (rows, rows[:1], rows[:20]):
            assert_bits(client.predict(part)[1], scorer.predict(part))
            assert_bits(client.predict_arrow(pa.Table.from_pylist(part))[1], scorer.predict(part))
