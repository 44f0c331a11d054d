"""What fit() says of a validation fold that cannot choose a best model."""

import math
from types import SimpleNamespace

import pytest

from ssr_rec import trainer
from ssr_rec.trainer import Fitted, TrainConfig


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "gives no auc for pay (rows of one class?)"),
        ({"monitor_task": "pay"}, "gives no auc for pay"),
        ({"monitor_task": "click"}, None),
        ({"monitor": "logloss"}, None),
    ],
)
def test_a_label_without_a_figure_in_the_validation_fold_is_said_once(monkeypatch, config, said):
    """Such as a rare pay: the mean over the labels is then undefined, and the first evaluation stays the best."""
    tasks = {"click": {"auc": 0.7, "logloss": 0.5}, "pay": {"auc": math.nan, "logloss": 0.1}}
    monkeypatch.setattr(trainer, "average_running_statistics", lambda model: None)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"loss": 0.3, "tasks": tasks, "metrics": "exact"})
    notes, saved = [], []
    loop = SimpleNamespace(
        config=TrainConfig(**config),
        fitted=Fitted(steps=10),
        train=SimpleNamespace(locate=lambda step: (0, step)),
        validation=lambda epoch: (None, {}),
        model=None,
        pipeline=None,
        beat=None,
        row=lambda split, epoch, **figures: figures,
        log=lambda row: None,
        note=notes.append,
        saver=SimpleNamespace(save_best=saved.append),
        weights=lambda: None,
    )
    for _ in range(3):
        trainer._validate(loop)
    assert len(saved) == 1 and loop.fitted.bad_evaluations == 2
    assert len(notes) == (said is not None) and all(said in note for note in notes)
