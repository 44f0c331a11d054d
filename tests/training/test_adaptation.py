"""SSR-A in the real job: when its dims move, that all ranks have the same, and what a resumed or skipped step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.checkpointing.format import read_info
from ssr_rec.checkpointing.resume import Start
from ssr_rec.checkpointing.warm_rows import Here
from ssr_rec.data.schema import Schema
from ssr_rec.over_archs.adaptive import Adapts
from ssr_rec.training.adaptation import Adaptation
from ssr_rec.training.trainer import Trainer
from tests.cases import slow
from tests.checkpointing.test_resume import options
from tests.ranks import run_ranks
from tests.small_ssr import batch, build
from tests.training.test_trainer import made, state_job

SETTINGS = [
    *("--over_arch.filter=adaptive", "--over_arch.adapt_every=5", "--over_arch.adapt_until=15"),
    "--over_arch.adapt_threshold=0",
    *("--train.max_steps=20", "--train.eval_every=null", "--checkpoint.keep=1"),
]
LOOKED_AT = list(range(6, 16))


class Seen:
    """Notes every call of ``look`` and ``adapt``, and compares them with what autograd and the optimizer have."""

    def __init__(self, trainer: Trainer) -> None:
        self.looked: list[int] = []
        self.steps: list[int] = []
        self.moved: list[int] = []
        self.states: list[set[str]] = []
        self.kept: dict[str, Tensor] = {}
        self.trainer, self.over_arch = trainer, trainer.over_arch
        self._look, self._adapt = self.over_arch.look, self.over_arch.adapt
        self.over_arch.look, self.over_arch.adapt = self.look, self.adapt
        self.over_arch.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            self.kept = {"x": inputs[0].detach().clone()}
            inputs[0].register_hook(lambda grad: self.kept.update(grad=grad.clone()))

    def look(self, x: Tensor, grad: Tensor, ranks: Any) -> None:
        assert torch.equal(x, self.kept["x"]) and torch.equal(grad, self.kept["grad"])
        self.looked.append(self.trainer.fitted.steps)
        # Without its first field the loss would be lower, whatever this log says.
        first = self.over_arch.field_dims[0]
        self._look(x, torch.cat([0.01 * x[:, :first], grad[:, first:]], 1), ranks)

    def adapt(self, step: int, states: Any, ranks: Any) -> None:
        first = self.over_arch.blocks()[0]
        before = first.filter.indices.clone()
        self._adapt(step, states, ranks)
        changed = before != first.filter.indices
        self.steps.append(step)
        self.moved.append(int(changed.sum()))
        self.states.append(set(states(first.fusion.dense.weight)))
        assert not first.fusion.dense.weight[changed].any()
        assert not states(first.fusion.dense.weight)["exp_avg"][changed].any()


def adapt_job(arguments: list[str], dataset: Path, folder: Path) -> Any:
    trainer = made(arguments, dataset, folder)
    seen = Seen(trainer)
    list(trainer.fit())
    assert trainer.adaptation.every is None
    return seen.looked, seen.steps, seen.moved, seen.states


def ends_job(arguments: list[str], dataset: Path, folder: Path) -> tuple[list[list[int]], list[list[float]]]:
    """The dims and biases of the first layer after training."""
    trainer = made(arguments, dataset, folder)
    first = trainer.over_arch.blocks()[0]
    before = first.filter.indices.clone()
    list(trainer.fit())
    assert not torch.equal(before, first.filter.indices)
    return first.filter.indices.tolist(), first.fusion.dense.bias.tolist()


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        slow(([], [10, 15])),
        (["--optimizer.ema_decay=0.9", "--optimizer.clip_norm=1.0", "--train.bf16=true"], [10, 15]),
        slow((["--train.accumulate=3"], [12, 15])),
        slow((["--train.accumulate=4"], [12, 16])),
    ],
    ids=["plain", "averages, clipping, bf16", "accumulate", "accumulate beyond the last"],
)
def test_dims_move_when_they_are_due(dataset: Path, tmp_path: Path, more: list[str], steps: list[int]) -> None:
    (found,) = run_ranks(adapt_job, 1, options(dataset, tmp_path, *SETTINGS, *more), dataset, tmp_path)
    looked, adapted, moved, states = found
    assert looked == LOOKED_AT and adapted == steps
    assert moved[0] > 0
    wanted = {"step", "exp_avg", "exp_avg_sq"} | ({"average"} if "--optimizer.ema_decay=0.9" in more else set())
    assert all(names == wanted for names in states)


@pytest.mark.slow
def test_ranks_agree_and_choose_as_one_does(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path, *SETTINGS)
    (alone,) = run_ranks(ends_job, 1, arguments, dataset, tmp_path / "one")
    first, second = run_ranks(ends_job, 2, arguments, dataset, tmp_path / "two")
    assert first == second
    assert first[0] == alone[0]


@pytest.mark.slow
def test_a_run_goes_on_from_between_two_moves(dataset: Path, tmp_path: Path) -> None:
    """It stops after step 8, the first of three that the exchange at 10 looks at: both ends are equal to the bit."""
    arguments = options(dataset, tmp_path, *SETTINGS, "--train.max_steps=16", "--train.eval_every=4")
    run_ranks(state_job, 1, arguments, dataset, tmp_path)


def sums_job(arguments: list[str], dataset: Path, folder: Path) -> list[bool]:
    """Whether the next exchange rests on any batch: of a run after step 9, of one resumed there and one begun there."""
    stopped = made([*arguments, "--train.max_steps=9"], dataset, folder / "stopped")
    list(stopped.fit())
    (checkpoint,) = (folder / "stopped" / "checkpoints").glob("step-*")
    resumed = made(arguments, dataset, folder / "resumed")
    resumed.load_state_dict(checkpoint, read_info(checkpoint))
    begun = made([*arguments, f"--warm_start={checkpoint}"], dataset, folder / "begun")
    begun.start(Start(folder, None, {}), Here(dataset, Schema.read(dataset)))
    trainers = (stopped, resumed, begun)
    over_archs = [trainer.over_arch for trainer in trainers]
    first, *others = (one.blocks()[0].filter.indices for one in over_archs)
    assert all(torch.equal(first, one) for one in others)
    return [bool(one.gates[:2].any()) for one in over_archs]


def test_a_warm_started_run_has_seen_no_batch_and_a_resumed_one_has(dataset: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(sums_job, 1, options(dataset, tmp_path, *SETTINGS), dataset, tmp_path)
    assert found == [True, True, False]


def test_a_batch_that_is_left_out_is_not_looked_at() -> None:
    """Neither one without a backward pass after one with, nor one of an evaluation."""
    ssr = build(filter="adaptive", adapt_every=2, adapt_until=6, adapt_threshold=0).train()
    adaptation = Adaptation(ssr, CombinedOptimizer([]))
    looked: list[int] = []
    ssr.look = lambda x, grad, ranks: looked.append(len(x))
    ssr(batch().requires_grad_()).sum().backward()
    adaptation.after(3)
    assert len(looked) == 1
    ssr(batch().requires_grad_()).sum().backward()
    ssr(batch().requires_grad_())  # no backward pass
    adaptation.after(4)
    ssr.eval()(batch().requires_grad_()).sum().backward()
    adaptation.after(5)
    assert len(looked) == 1 and adaptation.every == 2


@pytest.mark.parametrize(
    ("group", "every", "until", "steps"),
    [
        (1, 5, 12, [10]),
        (1, 5, 15, [10, 15]),
        (4, 5, 15, [12, 16]),
        (8, 5, 10, [16]),
        (16, 5, 15, [16]),
        (3, 5, 9, []),
        (5, 1, 7, [5, 10]),
    ],
)
def test_every_exchange_waits_for_an_update_of_the_over_arch(
    group: int, every: int, until: int, steps: list[int]
) -> None:
    ssr = build(filter="adaptive", adapt_every=2, adapt_until=4, adapt_threshold=0)
    found: list[int] = []
    ssr.adapts = lambda: Adapts(every, until)
    ssr.adapt = lambda step, *_: found.append(step)
    adaptation = Adaptation(ssr, CombinedOptimizer([]), group)
    for step in range(1, 41):
        adaptation.after(step)
    assert found == steps and adaptation.every is None


def test_an_over_arch_that_does_not_adapt_is_left_alone() -> None:
    ssr = build(filter="static").train()
    assert Adaptation(ssr, CombinedOptimizer([])).every is None and not ssr._forward_hooks
