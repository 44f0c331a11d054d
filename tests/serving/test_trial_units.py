"""A new model on trial is compared by probabilities, and by predictions of numbers in deviations of their label."""

from concurrent.futures import Future
from typing import Any

import numpy as np

from ssr_rec.serving.server_trial import Trial


def test_predictions_of_numbers_are_compared_in_deviations_of_the_label() -> None:
    batcher: Any = None
    answered = {"click": np.array([0.2, 0.4]), "watch_s": np.array([100.0, 300.0])}
    found: Future[dict[str, np.ndarray]] = Future()
    found.set_result({"click": np.array([0.21, 0.41]), "watch_s": np.array([103.0, 301.0])})
    verdicts = {}
    for name, units in (("scaled", {"watch_s": 50.0}), ("plain", {})):
        trial = Trial(batcher, ["click", "watch_s"], 1.0, 2, 0.05, units)
        trial._compare(found, answered)
        verdicts[name] = trial.problem()
        assert np.isclose(trial.differences()["click"], 0.01)
    assert verdicts["scaled"] == "" and str(verdicts["plain"]).startswith("watch_s differs by 2 on average")
