"""Describes the server's requests and answers for OpenAPI."""

from __future__ import annotations

from typing import Any

from fastapi.responses import PlainTextResponse

from ssr_rec.serving.server_requests import ARROW, JSON
from ssr_rec.serving.server_settings import ServerSettings

ROW = {
    "type": "object",
    "description": "columns of the log by name, none of which is needed: text, numbers, booleans, null, or lists of "
    "them; what the model has no feature for is ignored",
}
ERRORS = {
    400: "not a request, or a value of the wrong type, by row and feature",
    413: "too many bytes or rows",
    415: "neither JSON nor an Arrow IPC stream",
    429: "too many rows wait",
    500: "a fault of the server's own",
    503: "not scored in time",
}


ANSWERS = "by task, from 0 to 1; of a task whose label is a number, such as seconds, the prediction in its unit"


def describe(path: str, settings: ServerSettings) -> dict[str, Any]:
    """Return what ``FastAPI.add_api_route`` is told of a path."""
    if path != "/predict":
        summaries = {"/health": "Alive", "/ready": "Ready for requests", "/metrics": "Prometheus metrics"}
        described: dict[str, Any] = {"summary": summaries[path]}
        if path == "/metrics":
            described["response_class"] = PlainTextResponse
        if path == "/ready":
            described["responses"] = {503: {"description": "not loaded yet, or draining"}}
        return described
    return {
        "summary": "Probabilities of raw rows",
        "openapi_extra": {"requestBody": {"required": True, "content": _bodies(settings.max_rows)}},
        "responses": {
            200: {"description": "in the rows' order", "content": {JSON: {"schema": _answer()}, ARROW: {}}},
            **{status: {"description": text, "content": {JSON: {}}} for status, text in ERRORS.items()},
        },
    }


def _bodies(max_rows: int) -> dict[str, Any]:
    # Not maxItems: more rows are 413, which is documented, and not what a schema's violation answers.
    rows = {"type": "array", "items": ROW, "description": f"at most {max_rows}"}
    flat = {"type": "object", "required": ["rows"], "additionalProperties": False, "properties": {"rows": rows}}
    once = {
        "type": "object",
        "required": ["user", "candidates"],
        "additionalProperties": False,
        "properties": {"user": ROW, "candidates": rows},
    }
    return {JSON: {"schema": {"oneOf": [flat, once]}}, ARROW: {"schema": {"type": "string", "format": "binary"}}}


def _answer() -> dict[str, Any]:
    numbers = {"type": "array", "items": {"type": "number"}}
    return {
        "type": "object",
        "required": ["model", "probabilities"],
        "properties": {
            "model": {"type": "string"},
            "probabilities": {"type": "object", "additionalProperties": numbers, "description": ANSWERS},
        },
    }
