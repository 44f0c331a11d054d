"""AutoInt against plain loops over the paper's equations, nn.MultiheadAttention and the paper's Table 3."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs.autoint import AutoInt, InteractingLayer
from ssr_rec.over_archs.settings import AutoIntConfig

FIELDS, DIM, HEADS, HEAD_DIM, LAYERS, ROWS = 5, 4, 3, 2, 2, 6
WIDTH = HEADS * HEAD_DIM


def build(dim: int = DIM, **settings: Any) -> AutoInt:
    """Every parameter drawn anew, biases and norms included."""
    small = {"num_layers": LAYERS, "num_heads": HEADS, "attention_dim": HEAD_DIM}
    torch.manual_seed(0)
    model = AutoInt(FIELDS, dim, 1, AutoIntConfig(**(small | settings))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.6)
    return model


def batch(rows: int = ROWS, dim: int = DIM) -> Tensor:
    return torch.randn(rows, FIELDS * dim, generator=torch.Generator().manual_seed(1)).double()


def one_head(w_query: np.ndarray, w_key: np.ndarray, w_value: np.ndarray, e: np.ndarray, scale: bool) -> np.ndarray:
    """Eq. 5 and 6 for one sample: (F, dim) -> (F, d')."""
    rows = []
    for m in range(FIELDS):
        psi = np.array([np.dot(w_query @ e[m], w_key @ e[k]) for k in range(FIELDS)])
        if scale:
            psi = psi / np.sqrt(HEAD_DIM)
        alpha = np.exp(psi) / np.exp(psi).sum()
        rows.append(sum(alpha[k] * (w_value @ e[k]) for k in range(FIELDS)))
    return np.stack(rows)


def layer_by_loops(layer: InteractingLayer, e: np.ndarray, config: AutoIntConfig) -> np.ndarray:
    """Eq. 5-8 for one sample: (F, dim) -> (F, H d')."""
    project = layer.project.weight.detach().numpy().reshape(-1, HEADS, HEAD_DIM, e.shape[1])
    heads = [one_head(*(project[kind, head] for kind in range(3)), e, config.scale) for head in range(HEADS)]
    out = np.zeros((FIELDS, WIDTH))
    for m in range(FIELDS):
        out[m] = np.concatenate([head[m] for head in heads])
        if config.residual:
            out[m] += project[3].reshape(WIDTH, -1) @ e[m]
        out[m] = np.maximum(out[m], 0)
        if layer.norm is not None:
            scale, shift = layer.norm.weight.detach().numpy(), layer.norm.bias.detach().numpy()
            out[m] = (out[m] - out[m].mean()) / np.sqrt(out[m].var() + 1e-6) * scale + shift
    return out


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("deep_hidden", [[], [7, 3]])
def test_equals_the_equations(scale: bool, residual: bool, layer_norm: bool, deep_hidden: list[int]) -> None:
    model = build(scale=scale, residual=residual, layer_norm=layer_norm, deep_hidden=deep_hidden)
    w, rows = {name: value.numpy() for name, value in model.state_dict().items()}, []
    for x in batch().numpy():
        e = x.reshape(FIELDS, DIM)
        for layer in model.layers:
            e = layer_by_loops(layer, e, model.config)
        deep = x
        for i in range(len(deep_hidden)):
            deep = np.maximum(w[f"deep.{2 * i}.weight"] @ deep + w[f"deep.{2 * i}.bias"], 0)
        rows.append(np.concatenate([e.ravel(), deep]) if deep_hidden else e.ravel())
    y = model(batch())
    assert y.shape == (ROWS, model.out_features)
    torch.testing.assert_close(y, torch.from_numpy(np.stack(rows)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_equals_multihead_attention_forward_and_backward(num_layers: int) -> None:
    model = build(WIDTH, scale=True, num_layers=num_layers)
    attentions = []
    for layer in model.layers:
        attention = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True).double()
        with torch.no_grad():
            attention.in_proj_weight.copy_(layer.project.weight[: 3 * WIDTH])
            attention.out_proj.weight.copy_(torch.eye(WIDTH))
        attentions.append(attention)
    x, twin = batch(dim=WIDTH).requires_grad_(), batch(dim=WIDTH).requires_grad_()
    y = twin.view(ROWS, FIELDS, WIDTH)
    for layer, attention in zip(model.layers, attentions, strict=True):
        y = (attention(y, y, y)[0] + y @ layer.project.weight[3 * WIDTH :].T).relu()
    results = [(model(x), x), (y.flatten(1), twin)]
    for output, _ in results:
        (output * torch.arange(1.0, output.shape[1] + 1)).sum().backward()
    torch.testing.assert_close(*((output, leaf.grad) for output, leaf in results), rtol=1e-10, atol=1e-10)


def test_fields_in_another_order_give_the_same_features_in_that_order() -> None:
    """Heads split off without moving their axis mix rows of different fields, which this would show."""
    model, order = build(), torch.tensor([3, 0, 4, 1, 2])
    x = batch().view(ROWS, FIELDS, DIM)
    y = model(x.flatten(1)).view(ROWS, FIELDS, WIDTH)
    assert not torch.allclose(y[:, 0], y[:, 1])
    torch.testing.assert_close(model(x[:, order].flatten(1)).view_as(y), y[:, order])


def test_size_of_the_papers_table_3() -> None:
    """Criteo, 39 fields of 16 dims: 39,361 parameters, 3.9e4 in the paper, with the weights and bias of one head."""
    model = AutoInt(39, 16, 1)
    assert model.out_features == 39 * 2 * 32
    assert model.num_parameters == 4 * 16 * 64 + 2 * 4 * 64 * 64
    assert model.num_parameters + model.out_features + 1 == 39_361


def test_projections_start_with_the_variance_of_one_projection() -> None:
    torch.manual_seed(0)
    layer = InteractingLayer(3, 100, AutoIntConfig(num_heads=4, attention_dim=50))
    assert layer.project.weight.shape == (4 * 200, 100)
    assert layer.project.weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.01)


def test_dropout_acts_in_training_only_on_the_attention_weights_and_the_deep_layers() -> None:
    model, x = build(dropout=0.5, deep_hidden=[7]), batch()
    attention = FIELDS * WIDTH
    first, second = model(x), model(x)
    assert not torch.equal(first[:, :attention], second[:, :attention])
    assert not torch.equal(first[:, attention:], second[:, attention:])
    plain = build(deep_hidden=[7])
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain(x))


def test_dropped_attention_weights_are_those_of_single_pairs() -> None:
    """With equal values everywhere, what is left of a head is its sum of kept weights, doubled."""
    model = build(num_layers=1, residual=False, dropout=0.5)
    with torch.no_grad():
        model.layers[0].project.weight.zero_()
        model.layers[0].project.weight[2 * WIDTH :] = 1.0
    y = model(torch.ones(200, FIELDS * DIM).double()).view(-1, HEADS, HEAD_DIM) / DIM
    kept = y[..., 0] * FIELDS / 2
    torch.testing.assert_close(kept, kept.round())
    assert torch.equal(y[..., 0], y[..., 1]) and kept.min() == 0 and kept.max() == FIELDS
    assert kept.mean().item() == pytest.approx(FIELDS / 2, rel=0.05)


def test_input_norm_comes_before_both_networks() -> None:
    model, x = build(input_norm="per_field", deep_hidden=[7]), batch()
    norm, groups = model.input_norm, batch().view(ROWS, FIELDS, DIM)
    assert norm is not None
    normal = (groups - groups.mean((0, 2), keepdim=True)) / (
        groups.var((0, 2), unbiased=False, keepdim=True) + 1e-3
    ).sqrt()
    expected = model(x)
    model.input_norm = torch.nn.Identity()
    torch.testing.assert_close(expected, model((normal * norm.weight[:, None] + norm.bias[:, None]).flatten(1)))


@pytest.mark.parametrize("switches", [False, True])
def test_flops(switches: bool) -> None:
    deep = [7] if switches else []
    model = build(scale=switches, residual=not switches, layer_norm=switches, deep_hidden=deep).eval()
    with FlopCounterMode(display=False) as counter:
        model(batch())
    assert model.flops().matmul * ROWS == counter.get_total_flops()
    per_output = 1 + (1 + 7 if switches else 1)
    per_layer = 5 * FIELDS * FIELDS * HEADS + per_output * FIELDS * WIDTH
    assert model.flops().elementwise == LAYERS * per_layer + 2 * sum(deep)


@pytest.mark.parametrize(
    ("settings", "label"),
    [({}, "AutoInt 3x2x32"), ({"deep_hidden": [400, 400]}, "AutoInt+ 3x2x32 + 2x400")],
)
def test_label(settings: dict[str, Any], label: str) -> None:
    assert AutoIntConfig(**settings).label == label


@pytest.mark.parametrize(
    "settings", [{"num_layers": 0}, {"num_heads": 0}, {"attention_dim": 0}, {"deep_hidden": [0]}, {"dropout": 1.0}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        AutoIntConfig(**settings)


def test_fields_of_different_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="AutoInt needs fields of equal dims"):
        AutoInt(2, [4, 8], 1)
