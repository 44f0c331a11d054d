"""PLE against its equations written out in loops over samples, levels, experts and tasks."""

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssr_rec.over_archs.mmoe import Experts
from ssr_rec.over_archs.ple import PLE
from ssr_rec.over_archs.settings import PLEConfig

NUM_FIELDS, DIM, TASKS = 5, 4, 3
SMALL: dict[str, Any] = {
    "num_task_experts": 2,
    "num_shared_experts": 3,
    "expert_hidden": [7, 6],
    "tower_hidden": [5],
}


def build(tasks: int = TASKS, **settings: Any) -> PLE:
    """Every parameter random, so that no bias of 0 hides a mistake."""
    model = PLE(NUM_FIELDS, DIM, tasks, PLEConfig(**(SMALL | settings))).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return model


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, NUM_FIELDS * DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expert_layers(level: Any, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight (in, out) and bias of each layer of one expert."""
    found = []
    stacks = level.experts
    if isinstance(stacks, Experts):
        width = stacks.first.out_features // stacks.num_experts
        rows = slice(index * width, (index + 1) * width)
        found.append((stacks.first.weight[rows].T, stacks.first.bias[rows]))
        stacks = stacks.rest
    found += [(layer.weight[index], layer.bias[index]) for layer in stacks.layers]
    return [(weight.detach().numpy(), bias.detach().numpy()) for weight, bias in found]


def relu_stack(v: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    for weight, bias in layers:
        v = np.maximum(v @ weight + bias, 0)
    return v


def mix(gate: Any, v: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
    scores = [float(row @ v) for row in gate.weight.detach().numpy()]
    assert len(scores) == len(experts)
    shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
    return sum(share * expert for share, expert in zip(shares, experts, strict=True))


def reference(model: PLE, row: np.ndarray) -> np.ndarray:
    config, tasks = model.config, model.num_tasks
    of_task, of_all = [row] * tasks, row
    for number, level in enumerate(model.levels):
        own = [
            [relu_stack(of_task[k], expert_layers(level, k * config.num_task_experts + i)) for i in range(2)]
            for k in range(tasks)
        ]
        first_shared = tasks * config.num_task_experts
        shared = [relu_stack(of_all, expert_layers(level, first_shared + i)) for i in range(config.num_shared_experts)]
        mixed = [mix(level.gates[k], of_task[k], own[k] + shared) for k in range(tasks)]
        if number < config.num_levels - 1:
            of_all = mix(level.gates[tasks], of_all, [*chain(*own), *shared])
        of_task = mixed
    towers = [[(layer.weight[k], layer.bias[k]) for layer in model.towers.layers] for k in range(tasks)]
    as_numpy = [[(w.detach().numpy(), b.detach().numpy()) for w, b in tower] for tower in towers]
    return np.stack([relu_stack(v, tower) for v, tower in zip(of_task, as_numpy, strict=True)])


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"num_levels": 1}, {"num_levels": 3, "expert_hidden": [7]}, {"tower_hidden": []}]
)
def test_equals_its_equations_written_out(tasks: int, settings: dict[str, Any]) -> None:
    model, x = build(tasks, **settings), batch()
    expected = np.stack([reference(model, row.numpy()) for row in x])
    assert expected.shape == (4, tasks, model.out_features) and expected.std() > 0.1
    torch.testing.assert_close(model(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


def test_a_task_sees_its_own_experts_and_the_shared_ones_and_in_the_last_level_no_others() -> None:
    model = build()
    model(batch(64))[:, 1].sum().backward()
    first, last = model.levels
    trained = last.experts.layers[0].weight.grad.flatten(1).any(1).tolist()
    assert trained == [False, False, True, True, False, False, True, True, True]
    # Through the shared mixture of the first level every task's experts are reached.
    assert first.experts.first.weight.grad.view(9, -1).any(1).all()
    assert [bool(gate.weight.grad.any()) for gate in last.gates] == [False, True, False]


def test_costs() -> None:
    model = build()
    first, second = 9 * (20 * 7 + 7 * 6), 9 * (6 * 7 + 7 * 6)
    gates, last_gates = 20 * (3 * 5 + 9), 6 * 3 * 5
    towers, biases = 3 * 6 * 5, 2 * 9 * (7 + 6) + 3 * 5
    assert model.num_parameters == first + second + gates + last_gates + towers + biases
    mixtures = 6 * (3 * 5 + 9) + 6 * 3 * 5
    assert model.flops().matmul == 2 * (first + second + gates + last_gates + towers + mixtures)
    assert model.flops().elementwise == 2 * biases + 5 * (3 * 5 + 9 + 3 * 5)
    assert model.config.label == "PLE 2 levels 2+3x7-6 + 5"
