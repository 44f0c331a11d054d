"""Serves an artifact over HTTP: ``make_app(settings)`` is an ASGI application, ``serve(settings)`` runs it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request, Response

from ssr_rec.common.errors import UserError
from ssr_rec.common.heap import keep_freed_memory
from ssr_rec.common.plain_values import canonical_json
from ssr_rec.serving.artifact import MANIFEST_FILE
from ssr_rec.serving.scorer import Scorer, load
from ssr_rec.serving.server_batcher import Batcher, Busy, Closed, TooLate, Waiting
from ssr_rec.serving.server_description import describe
from ssr_rec.serving.server_metrics import FOLDER, ServerMetrics
from ssr_rec.serving.server_requests import ARROW, JSON, TooLarge, read_request, write_answer
from ssr_rec.serving.server_settings import ServerSettings
from ssr_rec.serving.server_trial import Trial

logger = logging.getLogger(__name__)
SETTINGS = "SSR_REC_SERVER"
"""The environment variable that tells a process of the server its settings, as JSON."""

KEEP_ALIVE_S = 75
"""So long an idle connection stays open; longer than the 60 s that proxies keep theirs, so that they close first."""


class Refused(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Model(NamedTuple):
    scorer: Scorer
    version: str
    batcher: Batcher


class Service:
    """Answers the requests of one process: reads a body, lets it wait for the scorer, writes the answer.

    Raises:
        UserError: see ``ssr_rec.serving.load``.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self.metrics = settings, ServerMetrics()
        self._seen = stamp_of(settings.artifact)
        self.model = self._answering(self._load())
        self.trial: tuple[Model, Trial] | None = None

    def _load(self) -> Model:
        """Return the artifact's model, checked and warm, made in a thread that ends: ``Program`` says why."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._loaded).result()

    def _loaded(self) -> Model:
        scorer = load(str(Path(self.settings.artifact).resolve()))  # of a link, one target throughout
        warm_up(scorer)
        settings = self.settings
        batcher = Batcher(scorer, settings.batch_rows, settings.batch_wait_ms / 1000, settings.queue_rows)
        self.metrics.models.labels("loaded").inc()
        return Model(scorer, version_of(scorer), batcher)

    def _answering(self, model: Model) -> Model:
        """Return a model whose requests the metrics count from now on: those of a trial count where they are answered.

        What a batcher tells asks nothing of the trial, which ends in another thread: a fault would end the batcher's.
        """

        def told(rows: int, requests: int) -> None:
            self.metrics.batch_rows.observe(rows)
            self.metrics.batch_requests.observe(requests)
            self.metrics.tell_values(model.scorer.values)

        model.batcher.told, model.batcher.tell_waiting = told, self.metrics.queue_rows.set
        return model

    def refresh(self) -> None:
        """Take the artifact's new model, if it was replaced, and drain the old one; a bad one changes nothing."""
        stamp = stamp_of(self.settings.artifact)
        if stamp is None or stamp == self._seen:
            self._judge()
            return
        self._seen = stamp
        self._end_trial()
        try:
            model = self._load()
        except Exception as error:  # whatever a bad artifact raises: it must not end the watch
            self._refuse(str(error) or type(error).__name__)
            return
        if stamp_of(self.settings.artifact) != stamp:
            # Replaced again while it was read: its files may be of both.
            self._seen = None
            model.batcher.close()
            return
        settings = self.settings
        if settings.trial_rows:
            limits = (settings.trial_share, settings.trial_rows, settings.trial_difference)
            units = {number.name: number.std for number in model.scorer.schema.numbers}
            self.trial = model, Trial(model.batcher, model.scorer.labels, *limits, units)
            logger.info(json.dumps({"event": "trial", "of": model.version, "beside": self.model.version}))
        else:
            self._switch(model)

    def _judge(self) -> None:
        """Let a model on trial take over, or refuse it, once it has scored enough."""
        if self.trial is None or (problem := self.trial[1].problem()) is None:
            return
        model, trial = self.trial
        differences = {label: round(value, 6) for label, value in trial.differences().items()}
        logger.info(
            json.dumps({"event": "trial ended", "of": model.version, "rows": trial.rows, "differences": differences})
        )
        if problem:
            self._end_trial()
            self._refuse(problem)
        else:
            self.trial = None
            self.metrics.leave_out(model.scorer.values)
            self._switch(model)

    def _refuse(self, reason: str) -> None:
        self.metrics.models.labels("refused").inc()
        logger.error(json.dumps({"event": "model refused", "reason": reason[:500]}))

    def _end_trial(self) -> None:
        if self.trial is not None:
            (model, _), self.trial = self.trial, None
            model.batcher.close()

    def _switch(self, model: Model) -> None:
        # One assignment: a request is scored by the model that it sees here, and answers with its version.
        old, self.model = self.model, self._answering(model)
        logger.info(json.dumps({"event": "model", "from": old.version, "to": model.version}))
        self._end(old)

    def close(self) -> None:
        """Score what waits; then nothing more is taken."""
        self._end_trial()
        self._end(self.model)

    def _end(self, model: Model) -> None:
        model.batcher.close()
        self.metrics.tell_values(model.scorer.values, now=True)

    async def predict(self, request: Request) -> Response:
        """Return the answer to a request, whatever becomes of it, and log it without its contents."""
        came, rows, version = time.monotonic(), 0, self.model.version
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        try:
            if kind not in (JSON, ARROW):
                raise Refused(415, f"content-type: give {JSON} or {ARROW}")
            body = await self._body(request)
            came = time.monotonic()
            rows, version, answer = await self._answer(kind, body, came)
            response = Response(answer, media_type=kind, headers={"x-model": version})
        except Refused as refused:
            again = {"retry-after": "1"} if refused.status in (429, 503) else {}
            body = json.dumps({"error": refused.message}).encode()
            response = Response(body, refused.status, media_type=JSON, headers={"x-model": version, **again})
        seconds = time.monotonic() - came
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.seconds.observe(seconds)
        event = {"event": "predict", "status": response.status_code, "kind": kind[:100], "rows": rows}
        logger.info(json.dumps({**event, "ms": round(1000 * seconds, 3), "model": version}))
        return response

    async def _body(self, request: Request) -> bytes:
        most = self.settings.max_bytes
        parts, size = [], 0
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > most:
            raise Refused(413, f"a body of {declared[:30]} bytes: at most {most}")
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"a body of more than {most} bytes")
            parts.append(part)
        return b"".join(parts)

    async def _answer(self, kind: str, body: bytes, came: float) -> tuple[int, str, bytes]:
        """Return the rows, the version of the model that scored them, and the answer's body."""
        try:
            found = read_request(kind, body, self.settings.max_rows)
            waiting = Waiting(found.encode, found.rows, came + self.settings.timeout_s)
            while True:
                model = self.model
                try:
                    model.batcher.submit(waiting)
                    break
                except Closed:
                    if model is self.model:  # the server ends
                        raise Refused(503, "the server is about to end") from None
            probabilities = await asyncio.wrap_future(waiting.answer)
            if (trial := self.trial) is not None:
                trial[1].take(found, probabilities)
        except TooLarge as error:
            raise Refused(413, str(error)) from None
        except Refused:
            raise
        except Busy:
            raise Refused(429, "too many rows wait; try again later, or elsewhere") from None
        except TooLate:
            raise Refused(503, f"not scored within {self.settings.timeout_s} s") from None
        except UserError as error:
            raise Refused(400, str(error)[:1000]) from None
        except Exception as error:
            # The message may have values of rows in it.
            logger.error(json.dumps({"event": "fault", "type": type(error).__name__}))
            raise Refused(500, "a fault of the server's own; its log has the type") from None
        return found.rows, model.version, write_answer(kind, model.version, probabilities)


def make_app(settings: ServerSettings) -> FastAPI:
    """Return an application that loads the artifact when it starts, and scores what waits before it ends.

    Raises:
        UserError: when it starts; see ``ssr_rec.serving.load``.
    """
    services: list[Service] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        service = Service(settings)
        services.append(service)
        watch = asyncio.create_task(_watch(service)) if settings.reload_s else None
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()
            services.clear()
            service.close()

    app = FastAPI(title="ssr_rec", lifespan=lifespan, docs_url=None, redoc_url=None)

    async def predict(request: Request) -> Response:
        return await services[0].predict(request)

    async def health() -> dict[str, str]:
        return {"status": "alive"}

    async def ready(response: Response) -> dict[str, str]:
        if not services:
            response.status_code = 503
            return {"status": "not ready"}
        return {"status": "ready", "model": services[0].model.version}

    async def metrics() -> Response:
        return Response(services[0].metrics.text(), media_type="text/plain; version=0.0.4")

    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("/predict", "POST", predict),
        ("/health", "GET", health),
        ("/ready", "GET", ready),
        ("/metrics", "GET", metrics),
    ]
    for path, method, function in routes:
        app.add_api_route(path, function, methods=[method], **describe(path, settings))
    return app


def warm_up(scorer: Scorer) -> None:
    """Score rows of missing values once, so that the first request does not pay for it."""
    if all(feature.encoding.type != "drawn" for feature in scorer.schema.features):
        scorer.score_arrays(*scorer.encoder.encode([{}]))


async def _watch(service: Service) -> None:
    while True:
        await asyncio.sleep(service.settings.reload_s)
        await asyncio.to_thread(service.refresh)


def version_of(scorer: Scorer) -> str:
    """Return what answers call the model: the first digits of a digest of its manifest."""
    return hashlib.sha256(canonical_json(scorer.manifest.model_dump(mode="json"))).hexdigest()[:12]


def stamp_of(artifact: str) -> tuple[int, int] | None:
    """Return what changes when an artifact is replaced, None where there is none at the moment."""
    try:
        found = (Path(artifact) / MANIFEST_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def app_of_process() -> FastAPI:
    """Return the application of one of the processes that ``serve`` starts."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return make_app(ServerSettings.model_validate_json(os.environ[SETTINGS]))


def serve(settings: ServerSettings) -> None:
    """Run the server until SIGTERM or SIGINT; then every request that was accepted is answered.

    A process that dies is started again. The processes are started afresh, not forked.

    Raises:
        UserError: an artifact that cannot be served, before anything listens.
    """
    load(settings.artifact)  # its checksums; and the operators are built once, not by every process
    with tempfile.TemporaryDirectory(prefix="ssr_rec.metrics.") as folder:
        os.environ[SETTINGS] = settings.model_dump_json()
        if settings.workers > 1:
            os.environ[FOLDER] = folder
        uvicorn.run(
            "ssr_rec.serving.server:app_of_process",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.drain_s),
            access_log=False,
            log_level="warning",
            server_header=False,
        )
