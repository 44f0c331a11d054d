"""Adam of the looked-up rows against a loop over rows and numbers, and its name against that of the other Adam."""

import math
import random

import pytest
import torch
from pydantic import ValidationError

from ssr_rec.config.embeddings import EmbeddingsConfig
from ssr_rec.training.lazy_adam import LazyAdam


def test_every_row_moves_as_a_loop_moves_it() -> None:
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    table = torch.nn.Parameter(torch.rand(6, 4, generator=generator, dtype=torch.float64))
    weights = table.tolist()
    m, v = ([[0.0] * 4 for _ in range(6)] for _ in range(2))
    lr, decay, eps, beta1, beta2 = 0.05, 0.1, 1e-6, 0.8, 0.95
    optimizer = LazyAdam([table], lr, (beta1, beta2), eps, decay)
    for t in range(1, 9):
        looked_up = draw.sample(range(5), 2)  # row 5 never is
        table.grad = torch.zeros_like(table)
        for row in looked_up:
            table.grad[row] = torch.randn(4, generator=generator, dtype=torch.float64)
        for row in looked_up:
            for column in range(4):
                g = table.grad[row, column].item()
                m[row][column] = beta1 * m[row][column] + (1 - beta1) * g
                v[row][column] = beta2 * v[row][column] + (1 - beta2) * g * g
                step = m[row][column] / (1 - beta1**t) / (math.sqrt(v[row][column] / (1 - beta2**t)) + eps)
                weights[row][column] -= lr * (step + decay * weights[row][column])
        before = table.detach().clone()
        optimizer.step()
        torch.testing.assert_close(table.detach(), torch.tensor(weights, dtype=torch.float64), atol=1e-12, rtol=0)
        still = [row for row in range(6) if row not in looked_up]
        assert torch.equal(table.detach()[still], before[still])


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_decay_that_would_do_nothing_is_refused(optimizer: str) -> None:
    with pytest.raises(ValidationError, match=f"weight_decay=0.1: FBGEMM's {optimizer} has none"):
        EmbeddingsConfig(optimizer=optimizer, weight_decay=0.1)
    assert EmbeddingsConfig(optimizer=optimizer).weight_decay == 0


def test_the_two_adams_have_two_names() -> None:
    for name, fused in (("adam", [False, False]), ("lazy_adam", [False, True])):
        assert [EmbeddingsConfig(optimizer=name).is_fused(device) for device in ("cpu", "cuda")] == fused
