"""CTRClassifier keeps scikit-learn's contract: its own checks, a pipeline and a search over a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from ssr_rec import CTRClassifier
from tests.estimator.test_classifier import SMALL, TABLES, make_log

CHECKED = CTRClassifier(
    over_arch={"name": "mlp", "hidden": [16]},
    epochs=10,
    batch_size=16,
    learning_rate=1e-2,
    verbose=False,
    config={"embeddings": {"learning_rate": 0.05}, "train": {"eval_every": None}},
)
DO_NOT_APPLY = {
    "check_methods_subset_invariance": "float32: a matrix product of other rows rounds otherwise, by 1.2e-7 where 1e-7 "
    "is allowed",
    "check_sample_weight_equivalence_on_dense_data": "repeated rows fall into other batches and splits than weighted "
    "ones; of equal batches the losses are equal (tests/training/test_row_weights.py)",
}
"""Check -> why it is none for this estimator. Checks of what it has not (decision_function, transform, partial_fit,
sparse input) skip themselves."""


@pytest.fixture(autouse=True, scope="module")
def no_pictures() -> Iterator[None]:
    """Curves would take as long as a small run's training."""
    with mock.patch("ssr_rec.runs.result.draw_curves", lambda *_: None):
        yield


@pytest.mark.slow
@parametrize_with_checks([CHECKED], expected_failed_checks=lambda _: DO_NOT_APPLY)
def test_the_checks_of_scikit_learn(estimator: CTRClassifier, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.slow
def test_a_pipeline_is_searched_over_a_grid() -> None:
    log = make_log(900)
    drop = FunctionTransformer(lambda frame: frame.drop(columns="time"))
    model = make_pipeline(drop, CTRClassifier(**SMALL, config=TABLES))
    search = GridSearchCV(model, {"ctrclassifier__epochs": [1, 4]}, cv=2)
    search.fit(log.drop(columns="click"), log["click"], ctrclassifier__categorical=["user", "item"])
    assert search.best_params_ == {"ctrclassifier__epochs": 4}
    one, four = search.cv_results_["mean_test_score"]
    assert four > one and search.score(log.drop(columns="click"), log["click"]) > 0.7
