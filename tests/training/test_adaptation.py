"""SSR-A in the real job: when its dims move, that all ranks have the same, and what a resumed or skipped step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

from ssr_rec.over_archs.base import OverArch
from ssr_rec.training.adaptation import Adaptation
from tests.checkpointing.test_resume import options
from tests.ranks import run_ranks
from tests.small_ssr import batch, build
from tests.training.test_trainer import made, state_job

SETTINGS = [
    *("--over_arch.filter=adaptive", "--over_arch.adapt_every=4", "--over_arch.adapt_until=12"),
    *("--over_arch.adapt_share=0.5", "--train.max_steps=20", "--train.eval_every=null", "--checkpoint.keep=1"),
]


class Seen:
    """Notes every call of ``adapt`` and compares what it is given with what autograd and the optimizer have."""

    def __init__(self, over_arch: OverArch) -> None:
        self.steps: list[int] = []
        self.moved: list[int] = []
        self.kept: dict[str, Tensor] = {}
        self.states: list[set[str]] = []
        self._adapt = over_arch.adapt
        self.over_arch = over_arch
        over_arch.adapt = self.adapt
        over_arch.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            self.kept = {"x": inputs[0].detach().clone()}
            output.register_hook(lambda grad: self.kept.update(grad=grad.clone()))

    def adapt(self, step: int, x: Tensor, grad: Tensor, states: Any, ranks: Any) -> None:
        first = self.over_arch.blocks()[0]
        assert torch.equal(x, self.kept["x"]) and torch.equal(grad, self.kept["grad"])
        before = first.filter.indices.clone()
        self._adapt(step, x, grad, states, ranks)
        changed = before != first.filter.indices
        self.steps.append(step)
        self.moved.append(int(changed.sum()))
        self.states.append(set(states(first.fusion.dense.weight)))
        assert not first.fusion.dense.weight[changed].any()
        assert not states(first.fusion.dense.weight)["exp_avg"][changed].any()


def adapt_job(arguments: list[str], dataset: Path, folder: Path) -> tuple[list[int], list[int], list[set[str]]]:
    trainer = made(arguments, dataset, folder)
    seen = Seen(trainer.over_arch)
    list(trainer.fit())
    assert trainer.adaptation.every is None
    return seen.steps, seen.moved, seen.states


def ends_job(arguments: list[str], dataset: Path, folder: Path) -> tuple[list[list[int]], list[list[float]]]:
    """The dims and biases of the first layer after training."""
    trainer = made(arguments, dataset, folder)
    list(trainer.fit())
    first = trainer.over_arch.blocks()[0]
    return first.filter.indices.tolist(), first.fusion.dense.bias.tolist()


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ([], [4, 8, 12]),
        (["--optimizer.ema_decay=0.9", "--optimizer.clip_norm=1.0", "--train.bf16=true"], [4, 8, 12]),
        (["--train.accumulate=3"], [6, 9, 12]),
    ],
    ids=["plain", "averages, clipping, bf16", "accumulate"],
)
def test_dims_move_when_they_are_due(dataset: Path, tmp_path: Path, more: list[str], steps: list[int]) -> None:
    ((seen, moved, states),) = run_ranks(adapt_job, 1, options(dataset, tmp_path, *SETTINGS, *more), dataset, tmp_path)
    assert seen == steps
    # Two views of 8 dims: half, then less, in the end none.
    shares = [round(0.5 * (1 - (step - 4) / 12) * 8) for step in steps]
    assert moved == [2 * share for share in shares]
    wanted = {"step", "exp_avg", "exp_avg_sq"} | ({"average"} if "--optimizer.ema_decay=0.9" in more else set())
    assert all(names == wanted for names in states)


def test_ranks_agree_and_choose_as_one_does(dataset: Path, tmp_path: Path) -> None:
    arguments = options(dataset, tmp_path, *SETTINGS)
    (alone,) = run_ranks(ends_job, 1, arguments, dataset, tmp_path / "one")
    first, second = run_ranks(ends_job, 2, arguments, dataset, tmp_path / "two")
    assert first == second
    assert first[0] == alone[0]


def test_a_run_goes_on_from_between_two_moves(dataset: Path, tmp_path: Path) -> None:
    """Step 8 of 16 moves dims, and so does 12: weights, dims and moments of both ends are equal to the bit."""
    arguments = options(dataset, tmp_path, *SETTINGS, "--train.max_steps=16", "--train.eval_every=4")
    run_ranks(state_job, 1, arguments, dataset, tmp_path)


def test_a_batch_that_is_left_out_moves_nothing() -> None:
    ssr = build(filter="adaptive", adapt_every=2, adapt_until=4, adapt_share=0.5).train()
    adaptation = Adaptation(ssr, CombinedOptimizer([]))
    before = ssr.blocks()[0].filter.indices.clone()
    ssr(batch()).sum().backward()
    ssr(batch())  # no backward pass
    adaptation.after(2)
    assert torch.equal(before, ssr.blocks()[0].filter.indices) and adaptation.every == 2
    ssr.eval()(batch()).sum().backward()
    adaptation.after(4)
    assert torch.equal(before, ssr.blocks()[0].filter.indices) and adaptation.every is None


def test_an_over_arch_that_does_not_adapt_is_left_alone() -> None:
    ssr = build(filter="static").train()
    assert Adaptation(ssr, CombinedOptimizer([])).every is None and not ssr._forward_hooks
