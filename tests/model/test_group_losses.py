"""Losses within groups against plain loops, finite differences, repeated rows and rows in another order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ssr_rec.common.errors import UserError
from ssr_rec.config.losses import PairwiseConfig, SoftmaxConfig
from ssr_rec.model.losses.within_groups import Pairwise, Softmax

LOSSES = {"softmax": (Softmax, SoftmaxConfig), "pairwise": (Pairwise, PairwiseConfig)}
GROUPS = [1, 2, 3, 5, 8, 13]


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    runs = torch.repeat_interleave(torch.arange(len(GROUPS) * 3), torch.tensor(GROUPS * 3))
    rows = len(runs)
    logits = torch.randn(rows, generator=rng, dtype=dtype) * 2
    labels = (torch.rand(rows, generator=rng) < 0.3).to(dtype)
    labels[runs == 4] = 1  # without a negative
    labels[runs == 5] = 0  # without a positive
    weights = torch.rand(rows, generator=rng, dtype=dtype) * (torch.rand(rows, generator=rng) < 0.8)
    return logits, labels, runs, weights


def total_of(name: str, *rows: Tensor | None, cross_entropy: float = 0.0) -> Tensor:
    """The sum of a loss over rows, as ``MeanLoss`` takes it."""
    kind, settings = LOSSES[name]
    logits, labels, runs, weights = rows
    losses = kind(settings(cross_entropy=cross_entropy))(logits, labels, weights, runs)
    return losses.sum() if weights is None else (torch.where(weights > 0, losses, 0.0) * weights).sum()


def by_loops(name: str, logits: Tensor, labels: Tensor, runs: Tensor, weights: Tensor) -> float:
    total = 0.0
    for group in set(runs.tolist()):
        own = [i for i in range(len(runs)) if runs[i] == group and weights[i] > 0]
        x, w = {i: logits[i].item() for i in own}, {i: weights[i].item() for i in own}
        positives, negatives = [i for i in own if labels[i]], [i for i in own if not labels[i]]
        if not positives or not negatives:
            continue
        for i in positives:
            if name == "softmax":
                total -= w[i] * math.log(math.exp(x[i]) / sum(w[j] * math.exp(x[j]) for j in own))
            else:
                pairs = sum(w[j] * math.log1p(math.exp(x[j] - x[i])) for j in negatives)
                total += w[i] * pairs / sum(w[j] for j in negatives)
    return total


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_is_that_of_loops_and_its_gradient_that_of_differences(name, weighted):
    logits, labels, runs, weights = drawn()
    given = weights if weighted else None
    expected = by_loops(name, logits, labels, runs, weights if weighted else torch.ones_like(logits))
    assert total_of(name, logits, labels, runs, given).item() == pytest.approx(expected, rel=1e-12) and expected > 5
    assert torch.autograd.gradcheck(lambda x: total_of(name, x, labels, runs, given), logits.requires_grad_())


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_share_of_cross_entropy_is_mixed_in(name):
    logits, labels, runs, weights = drawn(5)
    plain = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    mixed = total_of(name, logits, labels, runs, weights, cross_entropy=0.3)
    torch.testing.assert_close(mixed, 0.7 * total_of(name, logits, labels, runs, weights) + 0.3 * plain)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_weight_of_two_is_the_row_twice_and_what_is_not_there_may_be_anything(name):
    logits, labels, runs, _ = drawn(1)
    weights = torch.ones_like(logits)
    weights[::3], weights[1::7] = 2, 0
    junk = torch.where(weights > 0, logits, torch.nan).requires_grad_()
    loss = total_of(name, junk, labels, runs, weights)
    loss.backward()
    order = torch.repeat_interleave(torch.arange(len(logits)), weights.long())
    copies = logits[order].requires_grad_()
    plain = total_of(name, copies, labels[order], runs[order], None)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(junk.grad, torch.zeros_like(logits).index_add(0, order, copies.grad))


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_order_of_rows_and_the_numbers_of_groups_change_nothing(name):
    logits, labels, runs, weights = drawn(2)
    order = torch.randperm(len(runs), generator=torch.Generator().manual_seed(3))
    other = torch.randperm(len(GROUPS) * 3, generator=torch.Generator().manual_seed(4))[runs]
    here = total_of(name, logits, labels, runs, weights)
    there = total_of(name, logits[order], labels[order], other[order], weights[order])
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSSES))
def test_extreme_logits_and_no_rows_are_finite(name):
    logits = torch.tensor([-2e4, 2e4, 1e4, 300.0]).requires_grad_()
    loss = total_of(name, logits, torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]), None)
    loss.backward()
    assert loss.item() == pytest.approx(4e4) and logits.grad.isfinite().all()
    for rows in (0, 3):  # none; three groups of one
        alone = torch.ones(rows, requires_grad=True)
        loss = total_of(name, alone, torch.ones(rows), torch.arange(rows), None)
        loss.backward()
        assert loss.item() == 0 and not alone.grad.any()


def test_a_batch_without_groups_is_refused():
    with pytest.raises(UserError, match="prepare the log with together"):
        total_of("softmax", torch.zeros(2), torch.zeros(2), None, None)
