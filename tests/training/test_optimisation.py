"""Schedules against torch's own, Muon of views against torch's Muon, averages against AveragedModel; all resumed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.optim import swa_utils
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, PolynomialLR, StepLR
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from ssr_rec.checkpointing.format import read_checkpoint, stored_tensors
from ssr_rec.common.errors import UserError
from ssr_rec.config.run import load_config
from ssr_rec.config.schedule import KEYS, ScheduleConfig
from ssr_rec.data.schema import Schema
from ssr_rec.model.build import build_model
from ssr_rec.runs.folder import read_metrics
from ssr_rec.serving.trained_model import restore_model
from ssr_rec.training.averaging import Averaging, averaged_weights
from ssr_rec.training.muon import Together, ViewMuon
from ssr_rec.training.optimizer import build_optimizer
from ssr_rec.training.schedule import Schedule, factor
from ssr_rec.training.setup import start_process_group
from tests.jobs import own_optimizer_job, refused_job, stopped_job, train_job
from tests.ranks import run_ranks

SGD = torch.optim.SGD
TORCHS = {
    "linear": ({"end": 0.25}, lambda o, n: LinearLR(o, 1.0, 0.25, n)),
    "cosine": ({"end": 0.1}, lambda o, n: CosineAnnealingLR(o, n, eta_min=0.1)),
    "polynomial": ({"power": 1.5}, lambda o, n: PolynomialLR(o, n, 1.5)),
    "step": ({"factor": 0.3}, lambda o, n: StepLR(o, n, 0.3)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_schedules_are_torchs(name):
    keys, make = TORCHS[name]
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    scheduler: LRScheduler = make(optimizer, 12)
    config = ScheduleConfig(name=name, steps=12, **keys)
    for step in range(12 if name == "cosine" else 40):
        assert factor(config, step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()
    if name == "cosine":  # torch's rises again, ours stays
        assert factor(config, 40) == pytest.approx(0.1)


def test_tables_and_dense_part_have_schedules_of_their_own(dataset):
    options = ["--optimizer.warmup_steps=4", "--optimizer.schedule={name: linear, steps: 10}", "--embeddings.dim=8"]
    options += [
        "--over_arch.view_dim=8",
        "--embeddings.schedule={name: step, steps: 3, factor: 0.5}",
        "--embeddings.learning_rate=0.02",
    ]
    found = run_ranks(rates_job, 1, options, str(dataset))[0]
    dense = [0.25, 0.5, 0.75, 1, 1, *(1 - i / 10 for i in range(1, 11)), 0]
    tables = [0.25, 0.5, 0.75, 1, *(0.5 ** (i // 3) for i in range(12))]
    assert [rates["dense"] for rates in found] == pytest.approx([1e-3 * f for f in dense])
    assert [rates["fused"] for rates in found] == pytest.approx([0.02 * f for f in tables])


def rates_job(options: list[str], dataset: str) -> list[dict[str, float]]:
    config = load_config(None, options)
    device = start_process_group(config.device)
    optimizer = build_optimizer(
        build_model(config, Schema.read(dataset), device, 1, 1), config.optimizer, config.embeddings
    )
    schedule, found = Schedule(optimizer, config), []
    for step in range(16):
        schedule.set(step)
        found.append({name: group["lr"] for name, part in optimizer.optimizers for group in part.param_groups})
        assert found[-1]["dense"] == schedule.rate(step)
    return found


def test_muon_of_views_is_torchs_of_each_view():
    torch.manual_seed(0)
    views, matrix = torch.randn(3, 6, 4, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    alone = [part.detach().clone().requires_grad_() for part in (*views, matrix)]
    ours = ViewMuon([views, matrix], 0.02, 0.1)
    theirs = torch.optim.Muon(alone, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        views.grad, matrix.grad = torch.randn_like(views), torch.randn_like(matrix)
        for parameter, gradient in zip(alone, (*views.grad, matrix.grad), strict=True):
            parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    for mine, other in zip((*views, matrix), alone, strict=True):
        assert torch.equal(mine, other)


def test_together_steps_each_part_and_has_the_state_of_all():
    a, b = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    parts = [ViewMuon([a], 0.1, 0.0), torch.optim.AdamW([b], lr=0.1)]
    both = Together(parts)
    a.grad, b.grad = torch.ones(2, 2), torch.ones(2, 2)
    both.param_groups[1]["lr"] = 0.0
    both.step()
    assert not torch.equal(a, torch.ones(2, 2)) and torch.equal(b, torch.ones(2, 2))
    assert set(both.state[a]) == {"momentum_buffer"} and "exp_avg" in both.state[b]


def test_muon_takes_the_matrices_of_the_over_arch_alone(dataset):
    options = ["--optimizer.matrices=muon", "--embeddings.dim=8", "--over_arch.num_views=2", "--over_arch.view_dim=8"]
    assert set(run_ranks(own_optimizer_job, 1, options, str(dataset))[0].values()) == {"Together"}
    for filter_name in ("static", "dynamic"):
        more = [*options, f"--over_arch.filter={filter_name}"]
        names = run_ranks(muon_job, 1, more, str(dataset))[0]
        layers = {name.split("over_arch.")[1] for name in names}
        wanted = {f"layers.{i}.fusion.dense.weight" for i in (0, 1)}
        wanted |= {f"layers.{i}.filter.proj.weight" for i in (0, 1)} if filter_name == "dynamic" else set()
        assert layers == wanted


def muon_job(options: list[str], dataset: str) -> list[str]:
    config = load_config(None, options)
    device = start_process_group(config.device)
    model = build_model(config, Schema.read(dataset), device, 1, 1)
    optimizer = build_optimizer(model, config.optimizer, config.embeddings)
    (dense,) = (part for name, part in optimizer.optimizers if name == "dense")
    muon = next(part for part in dense._optimizer.parts if isinstance(part, ViewMuon))
    taken = {id(p) for p in muon.param_groups[0]["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in taken]


def test_averages_are_those_of_averaged_model():
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 2)
    wanted = swa_utils.AveragedModel(linear, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    adamw = KeyedOptimizerWrapper(dict(linear.named_parameters()), lambda p: torch.optim.AdamW(p, lr=0.1))
    keyed = Averaging(adamw, 0.8)
    optimizer = CombinedOptimizer([("dense", keyed)])
    for _ in range(5):
        optimizer.zero_grad()
        linear(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        wanted.update_parameters(linear)
    own = [p.detach().clone() for p in linear.parameters()]
    with averaged_weights(optimizer):
        for mine, theirs in zip(linear.parameters(), wanted.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    for mine, theirs in zip(linear.parameters(), own, strict=True):
        assert torch.equal(mine, theirs)


BASE = ["--over_arch.num_views=2", "--over_arch.view_dim=8", "--embeddings.dim=8", "--embeddings.learning_rate=0.02"]
BASE += ["--train.batch_size=64", "--train.eval_batch_size=100", "--train.eval_every=10", "--train.log_every=1"]
BASE += ["--train.max_steps=28", "--train.epochs=2"]
FALLING = "--optimizer.schedule={name: cosine, steps: 25}"
CASES = {
    "all": [
        *("--optimizer.matrices=muon", "--optimizer.ema_decay=0.9", "--optimizer.clip_norm=0.5", FALLING),
        *("--optimizer.warmup_steps=5", "--embeddings.schedule={name: linear, steps: 20, end: 0.1}"),
        "--over_arch.filter=dynamic",
    ],
    "unfused": [
        *("--embeddings.optimizer=adam", "--embeddings.schedule={name: step, steps: 7}", "--train.accumulate=2"),
        *("--train.log_every=2", "--optimizer.schedule={name: polynomial, steps: 30}", "--optimizer.ema_decay=0.5"),
    ],
    "lazy": [
        *("--embeddings.optimizer=lazy_adam", "--embeddings.schedule={name: step, steps: 7}", "--train.accumulate=2"),
        *("--train.log_every=2", FALLING),
    ],
    "uncertain": [
        *("--train.task_weighting=uncertainty", "--optimizer.schedule={name: step, steps: 8, factor: 0.5}"),
        *("--embeddings.schedule={name: cosine, steps: 20}", "--optimizer.ema_decay=0.8"),
    ],
    "muon alone": [
        *("--optimizer.matrices=muon", "--optimizer.schedule={name: linear, steps: 30, end: 0.1}"),
        "--embeddings.schedule={name: polynomial, steps: 25, power: 1.5}",
    ],
}


def test_every_schedule_of_either_part_is_resumed_below() -> None:
    """Constant ones are in every other test of resumed runs."""
    configs = [load_config(None, options) for options in CASES.values()]
    for part in ("optimizer", "embeddings"):
        assert {getattr(config, part).schedule.name for config in configs} == {*KEYS} - {"constant"}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_bit_for_bit(case, world_size, dataset, tmp_path):
    def options(runs: Path) -> list[str]:
        return [*BASE, f"--data.path={dataset}", f"--runs={runs}", "--name=run", *CASES[case]]

    whole = run_ranks(train_job, world_size, options(tmp_path / "whole"))[0]
    stop = 15 if case == "unfused" else 13
    assert run_ranks(stopped_job, world_size, options(tmp_path / "parts"), stop) == ["preempted"] * world_size
    resumed = run_ranks(train_job, world_size, options(tmp_path / "parts"))[0]
    mine, theirs = (read_metrics(tmp_path / name / "run" / "metrics.jsonl") for name in ("parts", "whole"))
    assert len(mine) == len(theirs) > 15
    for here, there in zip(mine, theirs, strict=True):
        for key in ("step", "split", "loss", "lr", "tasks", "task_weights"):
            assert here.get(key) == there.get(key), (there["step"], key)
    assert resumed["test"] == whole["test"]
    rates = [row["lr"] for row in theirs if row["split"] == "train"]
    assert rates[-1] < rates[len(rates) // 2] < max(rates)


@pytest.mark.slow
def test_what_is_evaluated_kept_and_exported_is_the_average(dataset, tmp_path):
    options = [*BASE, f"--data.path={dataset}", f"--runs={tmp_path}", "--train.max_steps=20", "--train.eval_every=20"]
    reports = {}
    for name, more in (("plain", []), ("ema", ["--optimizer.ema_decay=0.7"])):
        reports[name] = run_ranks(train_job, 1, [*options, f"--name={name}", *more])[0]
    losses = {
        name: [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["split"] == "train"]
        for name in reports
    }
    assert losses["plain"] == losses["ema"] and len(losses["ema"]) == 20
    assert reports["plain"]["test"] != reports["ema"]["test"]
    assert json.dumps(reports["ema"]["validation"]) != json.dumps(reports["plain"]["validation"])
    kept = restore_model(tmp_path / "ema").model.dense.state_dict()
    checkpoint = tmp_path / "ema" / "checkpoints" / "step-000000020"
    for name, weight in kept.items():
        stored = [n for n in stored_tensors(checkpoint) if n.endswith(f"model.dense.{name}/average")]
        assert len(stored) == ("indices" not in name), name
        if stored:
            average = torch.empty_like(weight)
            read_checkpoint({stored[0]: average}, checkpoint)
            assert torch.equal(weight, average), name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--optimizer.schedule.name=cosine", "cosine needs steps"),
        ("--optimizer.schedule={name: step, steps: 5, power: 3}", "power=3.0: step does not read it"),
        ("--embeddings.schedule.steps=5", "steps=5: constant does not read it"),
        ("--optimizer.ema_decay=1", "ema_decay"),
        ("--optimizer.schedule.name=linearly", "linearly"),
    ],
)
def test_settings_that_do_nothing_are_refused(override, said):
    with pytest.raises(UserError, match=said):
        load_config(None, [override])


def test_muon_without_matrices_is_refused(dataset, tmp_path):
    options = [*BASE, f"--data.path={dataset}", f"--runs={tmp_path}", "--optimizer.matrices=muon"]
    assert "no weight matrices" in run_ranks(no_matrices_job, 1, options)[0]
    assert not list(tmp_path.iterdir())


def no_matrices_job(options: list[str]) -> str:
    with mock.patch("ssr_rec.training.optimizer.is_matrix", lambda *_: False):
        return refused_job(options)
