"""GRDA against its update written out for one number, and its checkpoints."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

from ssr_rec.over_archs.grda import GRDA

STEPS = 40


def gradients(size: int = 5, steps: int = STEPS) -> list[list[float]]:
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()


def weights(size: int = 5) -> list[float]:
    return torch.randn(size, generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor(weights(), dtype=torch.float64))


def run(optimizer: Any, p: nn.Parameter, steps: list[list[float]]) -> Tensor:
    for gradient in steps:
        p.grad = torch.tensor(gradient, dtype=p.dtype)
        optimizer.step()
    return p.detach().clone()


def one_weight(w: float, steps: list[float], lr: float, c: float, mu: float) -> list[float]:
    """The weight after every step, with the threshold in closed form."""
    accumulator, history = w, []
    for k, gradient in enumerate(steps, start=1):
        accumulator -= lr * gradient
        threshold = c * lr ** (0.5 + mu) * k**mu
        size = abs(accumulator) - threshold
        history.append(0.0 if size <= 0 else size if accumulator > 0 else -size)
    return history


@pytest.mark.parametrize(("lr", "c", "mu"), [(1.0, 0.1, 0.6), (0.3, 0.2, 0.8), (0.2, 0.8, 0.51)])
def test_equals_the_update_of_one_number(lr: float, c: float, mu: float) -> None:
    p = parameter()
    optimizer = GRDA([p], lr=lr, c=c, mu=mu)
    seen = [run(optimizer, p, [gradient]).tolist() for gradient in gradients()]
    columns = [one_weight(w, [g[i] for g in gradients()], lr, c, mu) for i, w in enumerate(weights())]
    expected = [list(row) for row in zip(*columns, strict=True)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-12, atol=1e-13)
    flat = list(itertools.chain(*expected))
    assert 0 in flat and any(value > 0 for value in flat) and any(value < 0 for value in flat)


def test_without_threshold_it_is_sgd() -> None:
    ours, theirs = parameter(), parameter()
    result = run(GRDA([ours], lr=0.1, c=0.0, mu=0.7), ours, gradients())
    torch.testing.assert_close(result, run(torch.optim.SGD([theirs], lr=0.1), theirs, gradients()), rtol=0, atol=1e-14)


def test_a_closed_weight_returns_when_its_accumulator_outgrows_the_threshold() -> None:
    p = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = GRDA([p], lr=1.0, c=1.0, mu=0.6)
    history = [run(optimizer, p, [[-g]]).item() for g in (0.0, 0.0, 4.0)]
    assert history == pytest.approx([0, 0, 4.5 - 3**0.6])


def test_a_changing_learning_rate_scales_what_the_threshold_gains() -> None:
    rates, c, mu = [0.1, 0.2, 0.4, 0.4, 0.3], 0.5, 0.7
    p = parameter()
    optimizer = GRDA([p], lr=1.0, c=c, mu=mu)
    accumulators, threshold = weights(), 0.0
    for k, (rate, gradient) in enumerate(zip(rates, gradients(), strict=False), start=1):
        optimizer.param_groups[0]["lr"] = rate
        run(optimizer, p, [gradient])
        accumulators = [a - rate * g for a, g in zip(accumulators, gradient, strict=True)]
        threshold += c * rate ** (0.5 + mu) * (k**mu - (k - 1) ** mu)
    expected = [(1 if a > 0 else -1) * max(0.0, abs(a) - threshold) for a in accumulators]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_accumulator_starts_at_the_weight_of_the_first_step() -> None:
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = GRDA([p], lr=0.1, c=0.01, mu=0.6)
    with torch.no_grad():
        p.copy_(parameter())
    other = parameter()
    assert torch.equal(run(optimizer, p, gradients()), run(GRDA([other], lr=0.1, c=0.01, mu=0.6), other, gradients()))


def test_groups_keep_their_settings_and_parameters_without_gradient_stay() -> None:
    first, second, idle = parameter(), parameter(), parameter()
    optimizer = GRDA([{"params": [first]}, {"params": [second, idle], "c": 0.0}], lr=0.1, c=0.3, mu=0.6)
    for gradient in gradients():
        first.grad, second.grad = (torch.tensor(gradient, dtype=torch.float64) for _ in range(2))
        optimizer.step()
    alone = [parameter(), parameter()]
    assert torch.equal(first, run(GRDA([alone[0]], lr=0.1, c=0.3, mu=0.6), alone[0], gradients()))
    assert torch.equal(second, run(GRDA([alone[1]], lr=0.1, c=0.0, mu=0.6), alone[1], gradients()))
    assert torch.equal(idle, parameter()) and idle not in optimizer.state


def test_step_evaluates_a_closure_with_gradients() -> None:
    p = parameter()
    optimizer = GRDA([p], lr=0.1, c=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(sum(w * w for w in weights()))
    torch.testing.assert_close(p.detach(), 0.8 * parameter().detach())


def grda(params: list[nn.Parameter]) -> GRDA:
    return GRDA(params, lr=0.2, c=0.1, mu=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_state_goes_on_exactly(dtype: torch.dtype) -> None:
    p = nn.Parameter(parameter().detach().to(dtype))
    optimizer = grda([p])
    middle = run(optimizer, p, gradients()[:15])
    other = nn.Parameter(middle.clone())
    resumed = grda([other])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(run(resumed, other, gradients()[15:]), run(optimizer, p, gradients()[15:]))
    assert not torch.equal(p, run(grda([restarted := nn.Parameter(middle.clone())]), restarted, gradients()[15:]))


def test_torchrecs_keyed_optimizer_saves_and_loads_the_state() -> None:
    p = parameter()
    optimizer = KeyedOptimizerWrapper({"alpha": p}, grda)
    middle = run(optimizer, p, gradients()[:15])
    state = copy.deepcopy(optimizer.state_dict())
    assert list(state["state"]) == ["alpha"]
    assert all(isinstance(value, Tensor) for value in state["state"]["alpha"].values())
    expected = run(optimizer, p, gradients()[15:])

    other = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    resumed = KeyedOptimizerWrapper({"alpha": other}, grda)
    resumed.init_state()
    resumed.load_state_dict(state)
    with torch.no_grad():
        other.copy_(middle)
    assert torch.equal(run(resumed, other, gradients()[15:]), expected)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"c": -1e-3}, {"mu": 0.0}, {"mu": 1.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
        GRDA([parameter()], **settings)
