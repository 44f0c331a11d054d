"""A Trainer on a small dataset: rows as they come, its state there and back, and which evaluation it keeps."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssr_rec.checkpointing.format import read_info
from ssr_rec.checkpointing.manager import CheckpointManager
from ssr_rec.checkpointing.resume import Start
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.config.run import load_config
from ssr_rec.config.training import TrainConfig
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.training.datasets import open_rows
from ssr_rec.training.monitor import monitored, say_what_cannot_choose
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.setup import start_process_group
from ssr_rec.training.trainer import Trainer
from tests.checkpointing.test_resume import options
from tests.days_log import options as of_days
from tests.days_log import write_days
from tests.ranks import run_ranks


def made(arguments: list[str], dataset: Path, folder: Path, kind: type[Trainer] = Trainer) -> Trainer:
    config, schema, device = load_config(None, arguments), Schema.read(dataset), start_process_group("cpu")
    ranks = dist.get_world_size()
    model = build_model(config, schema, device, ranks, ranks)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    return kind(
        config, open_rows(config, dataset, schema), model, optimizer, CheckpointManager(config.checkpoint, folder)
    )


def state_job(arguments: list[str], dataset: Path, folder: Path) -> tuple[list[dict], list[dict], dict, dict]:
    """Rows of a whole training, and of one that goes on in a new Trainer; both ends' weights."""
    whole = made(arguments, dataset, folder / "whole")
    rows = list(whole.fit())
    first = made([*arguments, "--train.max_steps=8"], dataset, folder / "first")
    before = list(first.fit())
    checkpoint = next((folder / "first" / "checkpoints").glob("step-*8"))
    second = made(arguments, dataset, folder / "second")
    second.load_state_dict(checkpoint, read_info(checkpoint))
    assert second.fitted.steps == 8
    after = list(second.fit())
    ends = [{n: t.clone() for n, t in one.model.module.model.dense.state_dict().items()} for one in (whole, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert whole.test()["test"] == second.test()["test"]
    return rows, [*before, *after], whole.test()["row"], {"best": whole.fitted.best["step"]}


def test_rows_come_as_they_are_made_and_the_state_goes_on_in_another_trainer(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path, "--train.max_steps=16", "--train.eval_every=4", "--train.log_every=4")
    (found,) = run_ranks(state_job, 1, arguments, dataset, tmp_path)
    rows, resumed, tested, fitted = found
    assert [(row["split"], row["step"]) for row in rows] == [
        (split, step) for step in (4, 8, 12, 16) for split in ("train", "validation")
    ]
    for mine, theirs in zip(rows, resumed, strict=True):
        assert {key: mine[key] for key in ("step", "split", "loss", "tasks")} == {
            key: theirs[key] for key in ("step", "split", "loss", "tasks")
        }
    assert tested["split"] == "test" and tested["step"] == fitted["best"]


FOUND = [
    {"click": {"auc": auc, "logloss": clicks}, "pay": {"auc": math.nan, "logloss": pays}}
    for auc, clicks, pays in ((0.7, 0.5, 0.1), (0.6, 0.55, 0.01), (0.8, 0.6, 0.2))
]
"""Three evaluations; such as a rare pay, of which the validation fold may have no row."""
CASES: list[tuple[dict[str, Any], str | None, int]] = [
    ({}, "gives no auc for pay (rows of one class?), so that they do not count", 2),
    ({"monitor_task": "pay"}, "gives no auc for pay (rows of one class?), so that no evaluation is the best", 0),
    ({"monitor_task": "click"}, None, 2),
    ({"monitor": "logloss"}, None, 1),
    ({"monitor": "logloss", "task_weights": {"pay": 0.0}}, None, 0),
]


@pytest.mark.parametrize(("config", "said", "best"), CASES)
def test_labels_without_a_figure_or_a_weight_do_not_choose_the_best(caplog, config, said, best) -> None:
    caplog.set_level(logging.INFO)
    values = [monitored(tasks, TrainConfig(**config)) for tasks in FOUND]
    assert max(range(3), key=values.__getitem__) == best
    say_what_cannot_choose(FOUND[0], TrainConfig(**config))
    assert len(caplog.messages) == (said is not None) and all(said in text for text in caplog.messages)


def test_a_product_has_the_weight_of_its_label_in_choosing_the_best() -> None:
    tasks = {"click": {"auc": 0.7}, "pay": {"auc": 0.6}, "click*pay": {"auc": 0.9}}
    config: dict[str, Any] = {"entire_space": {"pay": "click"}}
    assert monitored(tasks, TrainConfig(**config)) == pytest.approx(2.2 / 3)
    assert monitored(tasks, TrainConfig(**config, task_weights={"pay": 0.0})) == 0.7
    assert monitored(tasks, TrainConfig(**config, task_weights={"click": 0.0})) == 0.75
    assert monitored(tasks, TrainConfig(**config, task_weights={"pay": 0.0}, monitor_task="click*pay")) == 0.9


class Told(Trainer):
    """Whose evaluations are given."""

    left = (0.6, 0.7, math.nan, 0.65)

    def evaluate(self, reader: Any, deciles: bool = False) -> dict[str, Any]:
        auc = self.left[min(self.fitted.steps // 4, len(self.left)) - 1]
        return {"loss": 0.3, "tasks": {"click": {"auc": auc}, "like": {"auc": math.nan}}, "metrics": "exact"}


def kept_job(arguments: list[str], dataset: Path, folder: Path) -> tuple[int, int]:
    trainer = made(arguments, dataset, folder, Told)
    list(trainer.fit())
    return trainer.fitted.best["step"], trainer.fitted.bad_evaluations


def lost_job(jobs: list[tuple[list[str], Path]], folder: Path) -> list[tuple[dict, dict, int | None]]:
    """Of trainings that ended and lost their best weights: tests before and after, and what was the best then."""
    found = []
    for number, (arguments, dataset) in enumerate(jobs):
        first = made(arguments, dataset, folder / f"first{number}")
        list(first.fit())
        before = first.test()["test"]
        checkpoints = folder / f"first{number}" / "checkpoints"
        for best in checkpoints.glob("best-*"):
            shutil.rmtree(best)
        (checkpoint,) = checkpoints.glob("step-*")
        second = made(arguments, dataset, folder / f"second{number}")
        second.start(Start(folder, checkpoint, read_info(checkpoint)), Here(dataset, second.schema))
        list(second.fit())
        found.append((before, second.test()["test"], second.fitted.best.get("step")))
    return found


def test_an_ended_training_whose_best_weights_are_lost_has_a_test(dataset: Path, tmp_path: Path) -> None:
    days = write_days(tmp_path / "days")
    one = options(dataset, tmp_path, "--train.max_steps=4", "--train.eval_every=4")
    jobs = [(one, dataset), (of_days(days, tmp_path, "--train.max_steps=5"), days)]
    for (before, after, best), step in zip(run_ranks(lost_job, 1, jobs, tmp_path)[0], (4, 5), strict=True):
        assert before == after and best == step


def test_the_best_is_kept_and_without_any_figure_the_last(dataset: Path, tmp_path: Path) -> None:
    more = ["--train.max_steps=16", "--train.eval_every=4"]
    for name, monitor, expected in (("a", "null", (8, 2)), ("b", "like", (16, 0))):
        arguments = options(dataset, tmp_path / name, *more, f"--train.monitor_task={monitor}")
        assert run_ranks(kept_job, 1, arguments, dataset, tmp_path / name) == [expected]
