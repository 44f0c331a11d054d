"""tools/soak_serving.py: which answers it takes for wrong."""

import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ssr_rec.serving.server_requests import JSON, write_answer


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("soak_serving")


@pytest.mark.parametrize("kind", ["application/json", "application/vnd.apache.arrow.stream"])
def test_only_right_answers_and_documented_errors_pass(soak: ModuleType, kind: str) -> None:
    wanted = {"one": {"click": np.array([0.25, 0.1], np.float32)}, "two": {"click": np.array([0.5, 0.1], np.float32)}}
    good, bad = soak.Sent(kind, b"x", wanted), soak.Sent(kind, b"y", None)

    def answer(version: str, *values: float) -> tuple[int, dict[str, str], bytes]:
        body = write_answer(kind, version, {"click": np.array(values, np.float32)})
        return 200, {"x-model": version}, body

    def error(status: int, body: bytes = b'{"error": "why"}') -> tuple[int, dict[str, str], bytes]:
        return status, {"x-model": "one"}, body

    checker = soak.Checker()
    for sent, found in [
        (good, answer("one", 0.25, 0.1)),
        (good, answer("two", 0.5, 0.1)),
        (good, answer("one", 0.25 + 2**-24, 0.1)),
        (bad, error(400)),
        (bad, error(415)),
        (bad, answer("one", 0.3)),
        (good, error(429)),
        (good, error(503)),
    ]:
        checker.check(sent, *found)
    assert not checker.wrong and checker.rounded == 1 and checker.statuses[200] == 4
    for sent, found in [
        (good, answer("one", 0.5, 0.1)),
        (good, answer("two", 0.25, 0.1)),
        (good, answer("three", 0.25, 0.1)),
        (good, answer("one", 0.25)),
        (good, error(400)),
        (bad, error(500)),
        (bad, error(400, b'{"detail": 1}')),
    ]:
        before = checker.wrong.total()
        checker.check(sent, *found)
        assert checker.wrong.total() == before + 1, found


def test_bad_requests_are_of_many_kinds(soak: ModuleType) -> None:
    draw = random.Random(0)
    good = soak.Sent(JSON, json.dumps({"rows": [{"user_id": 1}] * 3}).encode(), {})
    found = [soak.bad_request(draw, good) for _ in range(200)]
    assert all(sent.wanted is None and (sent.kind, sent.body) != (good.kind, good.body) for sent in found)
    assert len({(sent.kind, sent.body[:20]) for sent in found}) > 20
