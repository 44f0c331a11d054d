"""Whatever is raised in the thread that scores, those who wait for it hear of it."""

import time
from typing import Any

import numpy as np
import pytest

from ssr_rec.serving.raw_rows import Encoded
from ssr_rec.serving.server_batcher import Batcher, Closed, Waiting

ROW = Encoded(np.zeros((1, 1), np.int64), [], [], None)


class Ends:
    """Scores, or raises what is no ``Exception``."""

    def __init__(self, where: str) -> None:
        self.where = where

    def encode(self, scorer: Any) -> Encoded:
        if self.where == "encode":
            raise SystemExit
        return ROW

    def predict_encoded(self, encoded: Encoded) -> dict[str, np.ndarray]:
        if self.where == "predict":
            raise KeyboardInterrupt
        return {"click": np.zeros(encoded.rows, np.float32)}


def request(encode: Any) -> Waiting:
    return Waiting(encode, 1, time.monotonic() + 60)


@pytest.mark.parametrize("where", ["encode", "predict"])
def test_what_is_no_exception_is_said_and_the_next_is_answered(where: str) -> None:
    scorer: Any = Ends(where)
    batcher = Batcher(scorer, batch_rows=8, wait_s=0.0, queue_rows=8)
    bad, good = request(scorer.encode), request(lambda scorer: ROW)
    batcher.submit(bad)
    with pytest.raises(RuntimeError, match=r"SystemExit|KeyboardInterrupt"):
        bad.answer.result(20)
    scorer.where = ""
    batcher.submit(good)
    assert good.answer.result(20)["click"] == 0
    batcher.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended() -> None:
    scorer: Any = Ends("")
    batcher = Batcher(scorer, batch_rows=1, wait_s=0.0, queue_rows=8)

    def told(rows: int, requests: int) -> None:
        time.sleep(0.2)
        raise MemoryError

    batcher.told = told
    waiting = [request(scorer.encode) for _ in range(2)]
    for one in waiting:
        batcher.submit(one)
    for one in waiting:
        with pytest.raises(Closed):
            one.answer.result(20)
    with pytest.raises(Closed):
        batcher.submit(request(scorer.encode))
    batcher.close()
