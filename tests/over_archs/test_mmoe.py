"""MMoE against its equations written out in loops over samples, experts and tasks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ssr_rec.over_archs.mmoe import MMoE
from ssr_rec.over_archs.settings import MMoEConfig

NUM_FIELDS, DIM, TASKS = 5, 4, 3
SMALL: dict[str, Any] = {"num_experts": 4, "expert_hidden": [7, 6], "tower_hidden": [5]}


def build(seed: int = 0, tasks: int = TASKS, dims: int | list[int] = DIM, **settings: Any) -> MMoE:
    """Every parameter random, so that no bias of 0 hides a mistake."""
    model = MMoE(NUM_FIELDS, dims, tasks, MMoEConfig(**(SMALL | settings))).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return model


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, NUM_FIELDS * DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relu_stack(v: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    for weight, bias in layers:
        v = np.maximum(v @ weight + bias, 0)
    return v


def own_layers(w: dict[str, np.ndarray], prefix: str, index: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(w[f"{prefix}.{i}.weight"][index], w[f"{prefix}.{i}.bias"][index]) for i in range(count)]


def reference(model: MMoE, row: np.ndarray) -> np.ndarray:
    """Eq. 6 to 8."""
    config, w = model.config, {key: value.numpy() for key, value in model.state_dict().items()}
    first, experts = config.expert_hidden[0], []
    for i in range(config.num_experts):
        rows = slice(i * first, (i + 1) * first)
        layers = [(w["experts.first.weight"][rows].T, w["experts.first.bias"][rows])]
        layers += own_layers(w, "experts.rest.layers", i, len(config.expert_hidden) - 1)
        experts.append(relu_stack(row, layers))
    outputs = []
    for k in range(model.num_tasks):
        scores = [w["gates.weight"][k * config.num_experts + i] @ row for i in range(config.num_experts)]
        shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
        mixture = sum(share * expert for share, expert in zip(shares, experts, strict=True))
        outputs.append(relu_stack(mixture, own_layers(w, "towers.layers", k, len(config.tower_hidden))))
    return np.stack(outputs)


@pytest.mark.parametrize("tasks", [1, 3, 4])
@pytest.mark.parametrize(
    "settings",
    [{}, {"tower_hidden": []}, {"expert_hidden": [7]}, {"num_experts": 3, "expert_hidden": [5, 4, 3]}],
)
def test_equals_its_equations_written_out(tasks: int, settings: dict[str, Any]) -> None:
    """With as many tasks as experts a softmax over the wrong axis would keep its shape."""
    model, x = build(tasks=tasks, **settings), batch()
    expected = np.stack([reference(model, row.numpy()) for row in x])
    assert expected.shape == (4, tasks, model.out_features)
    torch.testing.assert_close(model(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 4])
def test_the_gates_of_a_task_sum_to_one_over_the_experts(tasks: int) -> None:
    model, x = build(tasks=tasks), batch()
    gates = model.gate(x)
    assert gates.shape == (4, tasks, 4)
    torch.testing.assert_close(gates.sum(2), torch.ones(4, tasks, dtype=torch.float64))
    assert (gates.sum(0) - 1).abs().min() > 1e-3
    assert tasks == 1 or (gates.sum(1) - 1).abs().min() > 1e-3


def test_a_task_sees_its_own_gate_and_tower_and_every_expert() -> None:
    model, x = build(), batch(64)
    model(x)[:, 1].sum().backward()
    of_task = [model.gates.weight.grad.view(TASKS, -1)]
    of_task += [p.grad.flatten(1) for p in model.towers.parameters()]
    for gradient in of_task:
        assert gradient.any(1).tolist() == [False, True, False]
    for parameter in model.experts.rest.parameters():
        assert parameter.grad.flatten(1).any(1).all()
    assert model.experts.first.weight.grad.view(4, -1).any(1).all()


def test_works_with_a_dim_per_field() -> None:
    assert torch.equal(build(dims=[3, 1, 8, 2, 6])(batch()), build()(batch()))


def test_costs() -> None:
    model = MMoE(NUM_FIELDS, DIM, TASKS, MMoEConfig(**SMALL))
    experts, gates, towers = 4 * (20 * 7 + 7 * 6), TASKS * 20 * 4, TASKS * 6 * 5
    assert model.num_parameters == experts + 4 * (7 + 6) + gates + towers + TASKS * 5
    assert model.flops().matmul == 2 * (experts + gates + TASKS * 4 * 6 + towers)
    assert model.flops().elementwise == 2 * 4 * (7 + 6) + 5 * TASKS * 4 + 2 * TASKS * 5
    assert model.config.label == "MMoE 4x7-6 + 5"
    assert MMoEConfig(tower_hidden=[]).label == "MMoE 8x128"


@pytest.mark.parametrize("initializer", ["glorot", "torch"])
def test_the_fans_are_those_of_one_expert_one_gate_and_one_tower(initializer: str) -> None:
    torch.manual_seed(0)
    config = MMoEConfig(num_experts=20, expert_hidden=[40, 30], tower_hidden=[50], initializer=initializer)
    model = MMoE(10, 8, 20, config)
    weights = {
        model.experts.first.weight: (80, 40),
        model.experts.rest.layers[0].weight: (40, 30),
        model.gates.weight: (80, 20),
        model.towers.layers[0].weight: (30, 50),
    }
    for weight, (fan_in, fan_out) in weights.items():
        bound = math.sqrt(6 / (fan_in + fan_out)) if initializer == "glorot" else 1 / math.sqrt(fan_in)
        assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert bool(model.experts.first.bias.any()) == (initializer == "torch")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 3), ({"tower_hidden": []}, 2), ({"expert_hidden": [7]}, 2)],
)
def test_dropout_follows_every_relu(settings: dict[str, Any], expected: int) -> None:
    model, x = build(dropout=0.5, **settings), batch()
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.equal(model(x), model(x))
    assert len(calls) == 2 * expected
    assert torch.equal(model.eval()(x), build(**settings)(x))


@pytest.mark.parametrize("kind", ["per_dim", "per_field"])
def test_input_norm(kind: str) -> None:
    normed, plain, x = build(input_norm=kind), build(), batch(6)
    plain.load_state_dict({key: v for key, v in normed.state_dict().items() if not key.startswith("input_norm")})
    torch.testing.assert_close(normed(x), plain(normed.input_norm(x)))
    assert not torch.allclose(normed(x), plain(x))


@pytest.mark.parametrize(
    "settings",
    [{"num_experts": 1}, {"expert_hidden": []}, {"expert_hidden": [0]}, {"tower_hidden": [0]}, {"dropout": 1.0}],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        MMoEConfig(**settings)
