"""AFN against its equations as plain loops."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from ssr_rec.over_archs.afn import AFN, MAX_EXPONENT
from ssr_rec.over_archs.layers import InputNorm
from ssr_rec.over_archs.settings import AFNConfig

FIELDS, DIM, NEURONS, ROWS = 4, 3, 5, 6
SMALL: dict[str, Any] = {"num_neurons": NEURONS, "hidden": [7, 6], "initializer": "torch"}
PLAIN: dict[str, Any] = {"batch_norm": False, "hidden_norm": "none"}


def build(**settings: Any) -> AFN:
    """Small, float64, every parameter and running statistic drawn at random."""
    torch.manual_seed(0)
    afn = AFN(FIELDS, DIM, 2, AFNConfig(**(SMALL | settings))).double()
    for module in afn.modules():
        if isinstance(module, InputNorm | nn.LayerNorm):
            for tensor in module.state_dict().values():
                tensor.uniform_(0.5, 1.5)
    nn.init.normal_(afn.neurons.bias)
    return afn


def batch(rows: int = ROWS, seed: int = 1) -> Tensor:
    x = torch.randn(rows, FIELDS * DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0, 0] = 0.0  # one of them below the clamp
    return x


def products(afn: AFN, x: Tensor) -> Tensor:
    """Powers and products number by number, without a logarithm: (B, F*D) -> (B, N*D)."""
    w, b, out = afn.neurons.weight.tolist(), afn.neurons.bias.tolist(), []
    for row in x.tolist():
        values = []
        for n in range(NEURONS):
            for d in range(DIM):
                value = math.exp(b[n])
                for f in range(FIELDS):
                    value *= max(abs(row[f * DIM + d]), 1e-4) ** w[f][n]
                values.append(value)
        out.append(values)
    return torch.tensor(out, dtype=torch.float64)


def normed(values: list[list[float]], group: int, norm: nn.Module, training: bool) -> list[list[float]]:
    """Batch norm of ``group`` columns at a time, over rows and columns, biased variance, eps 1e-3."""
    scale, shift = norm.weight.tolist(), norm.bias.tolist()
    means, variances = norm.running_mean.tolist(), norm.running_var.tolist()
    out = [list(row) for row in values]
    for c in range(len(scale)):
        columns = range(c * group, (c + 1) * group)
        pool = [row[i] for row in values for i in columns]
        mean = sum(pool) / len(pool) if training else means[c]
        variance = sum((v - mean) ** 2 for v in pool) / len(pool) if training else variances[c]
        for row in out:
            for i in columns:
                row[i] = (row[i] - mean) / math.sqrt(variance + 1e-3) * scale[c] + shift[c]
    return out


def relu_layers(stack: nn.Sequential, values: list[list[float]], training: bool) -> Tensor:
    for layer in stack:
        if isinstance(layer, InputNorm):
            values = normed(values, 1, layer, training)
            continue
        weight, bias = layer[0].weight.tolist(), layer[0].bias.tolist()
        values = [
            [max(sum(v * w for v, w in zip(row, ws, strict=True)) + b, 0.0) for ws, b in zip(weight, bias, strict=True)]
            for row in values
        ]
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_neurons_are_products_of_powers() -> None:
    afn, x = build(**PLAIN), batch()
    close(afn.neurons(x), products(afn, x))
    close(afn(x), relu_layers(afn.layers, products(afn, x).tolist(), training=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equals_the_authors_formula_with_batch_norm(training: bool) -> None:
    afn, x = build().train(training), batch()
    logs = [[math.log(max(abs(v), 1e-4)) for v in row] for row in x.tolist()]
    assert afn.neurons.log_norm is not None and afn.neurons.exp_norm is not None
    # Evaluation reads the statistics, training overwrites them.
    logs = normed(logs, DIM, afn.neurons.log_norm, training)
    w, b = afn.neurons.weight.tolist(), afn.neurons.bias.tolist()
    powers = [
        [
            math.exp(b[n] + sum(w[f][n] * row[f * DIM + d] for f in range(FIELDS)))
            for n in range(NEURONS)
            for d in range(DIM)
        ]
        for row in logs
    ]
    expected = relu_layers(afn.layers, normed(powers, DIM, afn.neurons.exp_norm, training), training)
    close(afn(x), expected)


def test_training_moves_the_statistics_evaluation_does_not() -> None:
    afn, x = build(), batch()
    before = {name: value.clone() for name, value in afn.named_buffers()}
    afn.eval()(x)
    assert all(torch.equal(value, before[name]) for name, value in afn.named_buffers())
    afn.train()(x)
    assert before and not any(torch.equal(value, before[name]) for name, value in afn.named_buffers())
    # By the authors' weight of a new batch, in the norms of logarithms, of neurons and of layers.
    logs = x.abs().clamp(min=1e-4).log().view(ROWS, FIELDS, DIM).mean((0, 2))
    close(afn.neurons.log_norm.running_mean, 0.9 * before["neurons.log_norm.running_mean"] + 0.1 * logs)
    assert {module.momentum for module in afn.modules() if isinstance(module, InputNorm)} == {0.1}


def test_a_training_batch_of_one_row_uses_the_running_statistics() -> None:
    afn, row = build(), batch()[1:2]
    close(afn.train()(row), afn.eval()(row))


def test_layer_norm_stands_before_the_relu() -> None:
    afn, x = build(batch_norm=False, hidden_norm="layer"), batch()
    y = products(afn, x)
    for layer in afn.layers:
        y = y @ layer[0].weight.T + layer[0].bias
        y = F.layer_norm(y, y.shape[1:], layer[1].weight, layer[1].bias, eps=1e-6).clamp(min=0)
    close(afn(x), y)


def test_plus_sums_the_logits_of_two_networks() -> None:
    afn, x, deep = build(plus=True, deep_hidden=[9, 4], **PLAIN), batch(), batch(seed=2)
    assert afn.extra_tables == {"deep": (DIM,) * FIELDS}
    assert afn.out_features == 6 + 4
    assert afn.deep_layers is not None
    head = torch.randn(10, dtype=torch.float64)
    y_afn = relu_layers(afn.layers, products(afn, x).tolist(), training=True) @ head[:6]
    y_deep = relu_layers(afn.deep_layers, deep.tolist(), training=True) @ head[6:]
    close(afn(x, deep) @ head, y_afn + y_deep)


def test_without_plus_there_is_no_second_table() -> None:
    assert build().extra_tables == {}
    with pytest.raises(ValueError, match="plus=False takes 1 input"):
        build()(batch(), batch())
    with pytest.raises(ValueError, match="plus=True takes 2 input"):
        build(plus=True)(batch())


@pytest.mark.parametrize("kind", ["per_dim", "per_field"])
def test_input_norm_is_for_both_networks(kind: str) -> None:
    torch.manual_seed(0)
    settings = {**PLAIN, "plus": True, "deep_hidden": [9, 4]}
    afn = AFN(FIELDS, DIM, 2, AFNConfig(**SMALL, **settings, input_norm=kind)).double()
    plain = AFN(FIELDS, DIM, 2, AFNConfig(**SMALL, **settings)).double()
    plain.load_state_dict({k: v for k, v in afn.state_dict().items() if k in plain.state_dict()})
    inputs = []
    for x in (batch(), batch(seed=2)):
        groups = x.view(ROWS, -1, DIM if kind == "per_field" else 1)
        mean, variance = groups.mean((0, 2), keepdim=True), groups.var((0, 2), unbiased=False, keepdim=True)
        inputs.append(((groups - mean) / (variance + 1e-3).sqrt()).flatten(1))
    close(afn(batch(), batch(seed=2)), plain(*inputs))


def test_the_sign_and_anything_below_the_clamp_do_not_count() -> None:
    afn, x = build(clamp_min=0.5).eval(), batch().requires_grad_()
    y = afn(x)
    close(afn(-x), y)
    close(afn(torch.where(x.abs() < 0.5, 0.0, x)), y)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, x.abs() >= 0.5)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("orders", [1.0, 300.0], ids=["fresh", "huge orders"])
@pytest.mark.parametrize("kind", ["zeros", "tiny", "huge", "negative", "mixed"])
def test_extreme_embeddings_keep_outputs_and_gradients_finite(kind: str, orders: float, batch_norm: bool) -> None:
    torch.manual_seed(0)
    config = AFNConfig(**SMALL, **({} if batch_norm else PLAIN))
    afn, x = AFN(FIELDS, DIM, 1, config), batch(32).float()
    x = {"zeros": 0 * x, "tiny": 1e-40 * x, "huge": 1e30 * x, "negative": -1e3 * x.abs(), "mixed": x**31}[kind]
    with torch.no_grad():
        afn.neurons.weight.mul_(orders)
    for training in (True, False):
        afn.zero_grad()
        x = x.detach().requires_grad_()
        y = afn.train(training)(x)
        y.mean().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        for tensor in (y, *(p.grad for p in afn.parameters())):
            # The optimizers keep squares.
            assert tensor is not None and tensor.square().isfinite().all()


def test_the_exponent_is_limited_above_only() -> None:
    afn = build(**PLAIN)
    nn.init.constant_(afn.neurons.weight, 0.0)
    biases = torch.tensor([MAX_EXPONENT + 5, MAX_EXPONENT - 1, 0.0, -MAX_EXPONENT - 5, 1.0], dtype=torch.float64)
    afn.neurons.bias.data = biases
    close(afn.neurons(batch())[0, ::DIM].log(), biases.clamp(max=MAX_EXPONENT))


def test_neurons_stay_in_float32_under_bfloat16() -> None:
    afn, x = build().float().eval(), batch().float()
    outside, rounded = afn.neurons(x), afn.neurons(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert afn(x).dtype == torch.bfloat16
        assert torch.equal(afn.neurons(x), outside)
        assert torch.equal(afn.neurons(x.bfloat16()), rounded)
    assert not torch.equal(outside, rounded)


def test_dropout_acts_in_training_only() -> None:
    afn, x = build(dropout=0.5), batch()
    assert not torch.equal(afn(x), afn(x))
    without = build().eval()
    for target, source in zip(without.state_dict().values(), afn.state_dict().values(), strict=True):
        target.copy_(source)
    close(afn.eval()(x), without(x))


def test_start_of_the_orders() -> None:
    torch.manual_seed(0)
    neurons = AFN(39, 4, 1).neurons
    assert neurons.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(neurons.weight.mean().item()) < 0.002
    assert not neurons.bias.any()


def test_cost_of_the_defaults() -> None:
    afn = AFN(39, 16, 1)
    wide = 600 * 16
    dense = wide * 400 + 2 * 400 * 400
    assert afn.out_features == 400
    # Orders and biases, norms after log and exp; layers with bias, then batch norm.
    assert afn.num_parameters == 39 * 600 + 600 + 2 * 39 + 2 * 600 + dense + 3 * 400 * 3
    # 3 + 2 per input dim, 3 + 2 per cross feature's dim; bias, ReLU and norm per unit.
    matmul = 2 * 39 * wide + 2 * dense
    assert afn.flops().matmul == matmul
    assert afn.flops_per_sample == matmul + 5 * 624 + 5 * wide + 3 * 400 * 4
    plus = AFN(39, 16, 1, AFNConfig(plus=True, input_norm="per_dim"))
    deep = 624 * 400 + 2 * 400 * 400
    assert plus.num_parameters - afn.num_parameters == deep + 3 * 400 * 3 + 2 * 2 * 624
    assert plus.flops_per_sample - afn.flops_per_sample == 2 * deep + 3 * 400 * 4 + 2 * 2 * 624


def test_fields_of_different_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="AFN needs fields of equal dims"):
        AFN(2, [4, 8], 1)


@pytest.mark.parametrize(
    "settings",
    [{"num_neurons": 0}, {"hidden": []}, {"clamp_min": 0.0}, {"hidden_norm": "group"}, {"deep_hidden": [8]}],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        AFNConfig(**settings)


def test_labels() -> None:
    assert AFNConfig().label == "AFN 600 neurons 3x400"
    assert AFNConfig(plus=True, hidden=[8, 4]).label == "AFN+ 600 neurons 8-4 + 3x400"
