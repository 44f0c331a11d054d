"""Wukong against its equations written out in loops over samples, layers and embeddings."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssr_rec.over_archs.settings import WukongConfig
from ssr_rec.over_archs.wukong import FactorizationMachineBlock, Wukong

NUM_FIELDS, DIM = 5, 4
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "fmb_embeddings": 2,
    "lcb_embeddings": 4,
    "fm_rank": 3,
    "fmb_hidden": [7],
    "hidden": [9],
}


def build(seed: int = 0, **settings: Any) -> Wukong:
    """Every parameter random, so that no bias of 0 or scale of 1 hides a mistake."""
    model = Wukong(NUM_FIELDS, DIM, 1, WukongConfig(**(SMALL | settings))).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, NUM_FIELDS * DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_norm(v: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (v - v.mean()) / math.sqrt(v.var() + eps) * weight + bias


def relu_layers(v: np.ndarray, w: dict[str, np.ndarray], prefix: str, count: int) -> np.ndarray:
    for i in range(count):
        v = np.maximum(w[f"{prefix}.{2 * i}.weight"] @ v + w[f"{prefix}.{2 * i}.bias"], 0)
    return v


def combinations(weight: np.ndarray, x: list[np.ndarray]) -> list[np.ndarray]:
    return [sum(weight[row, i] * x[i] for i in range(len(x))) for row in range(len(weight))]


def reference(model: Wukong, row: np.ndarray) -> np.ndarray:
    config, w = model.config, {key: value.numpy() for key, value in model.state_dict().items()}
    eps = config.layer_norm_eps
    x = [row[i * DIM : (i + 1) * DIM] for i in range(NUM_FIELDS)]
    for n in range(config.num_layers):
        b = {key.removeprefix(f"layers.{n}."): value for key, value in w.items()}
        dots = np.array([[u @ v for v in x] for u in x])
        flat = (dots @ b["fmb.projection.weight"].T).flatten()
        flat = layer_norm(flat, b["fmb.norm.weight"], b["fmb.norm.bias"], eps)
        made = b["fmb.out.weight"] @ relu_layers(flat, b, "fmb.layers", len(config.fmb_hidden)) + b["fmb.out.bias"]
        fmb = [made[i * DIM : (i + 1) * DIM] for i in range(config.fmb_embeddings)]
        lcb = combinations(b["lcb.weight"], x)
        residual = combinations(b["residual.weight"], x) if "residual.weight" in b else x
        x = [
            layer_norm(new + old, b["norm.weight"], b["norm.bias"], eps)
            for new, old in zip(fmb + lcb, residual, strict=True)
        ]
    return relu_layers(np.concatenate(x), w, "output_mlp", len(config.hidden))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_layers": 1, "fmb_hidden": [], "hidden": []},
        {"num_layers": 3, "fmb_embeddings": 4, "lcb_embeddings": 1, "fmb_hidden": [6, 7], "hidden": [9, 8]},
        {"fm_rank": 1, "layer_norm_eps": 0.3},
    ],
)
def test_equals_its_equations_written_out(settings: dict[str, Any]) -> None:
    model, x = build(**settings), batch()
    expected = np.stack([reference(model, row.numpy()) for row in x])
    assert model.out_features == expected.shape[1]
    torch.testing.assert_close(model(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_the_residual_is_projected_only_where_the_number_of_embeddings_changes() -> None:
    changed, kept = build(), build(lcb_embeddings=3)
    assert [layer.residual is not None for layer in changed.layers] == [True, False]
    assert [layer.residual is not None for layer in kept.layers] == [False, False]


def test_the_fm_never_makes_all_pairs() -> None:
    """X (X^T Y): two products of n k D multiply-adds; (X X^T) Y would be n^2 (D + k)."""
    rows, dim, rank = 40, 4, 3
    block = FactorizationMachineBlock(rows, dim, WukongConfig(fm_rank=rank, fmb_hidden=[], fmb_embeddings=1))
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, rows, dim))
    assert counter.get_total_flops() == 2 * (2 * rows * rank * dim) + 2 * rows * rank * dim
    assert block.flops().matmul == counter.get_total_flops()


def test_costs() -> None:
    model = Wukong(10, 4, 1, WukongConfig(**(SMALL | {"num_layers": 1})))
    fm_values, made = 10 * 3, 2 * 4
    fmb = 3 * 10 + 2 * fm_values + (fm_values * 7 + 7) + (7 * made + made)
    assert model.num_parameters == fmb + 4 * 10 + 6 * 10 + 2 * 4 + (6 * 4 * 9 + 9)
    fm, lcb_and_residual = 2 * fm_values * 4, (4 + 6) * 10 * 4
    matmul = fm + fm_values * 7 + 7 * made + lcb_and_residual + 6 * 4 * 9
    assert model.flops().matmul == 2 * matmul
    assert model.flops().elementwise == 7 * fm_values + 2 * 7 + made + 6 * 4 * (1 + 7) + 2 * 9
    assert model.config.label == "Wukong 1x(2+4) k=3"


@pytest.mark.parametrize("initializer", ["glorot", "torch"])
def test_initializer(initializer: str) -> None:
    torch.manual_seed(0)
    settings = {"fmb_embeddings": 20, "lcb_embeddings": 40, "fm_rank": 24, "initializer": initializer}
    model = Wukong(50, 16, 1, WukongConfig(**settings))
    layer = model.layers[0]
    for weight in (layer.fmb.projection.weight, layer.lcb.weight, layer.residual.weight, layer.fmb.out.weight):
        fan_out, fan_in = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out)) if initializer == "glorot" else 1 / math.sqrt(fan_in)
        assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert bool(layer.fmb.out.bias.any()) == (initializer == "torch")


@pytest.mark.parametrize("place", ["fmb_hidden", "hidden"])
def test_dropout_acts_in_training_only(place: str) -> None:
    only = {"fmb_hidden": [], "hidden": [], place: [8]}
    model, x = build(dropout=0.5, **only), batch()
    plain = build(**only)
    assert not torch.equal(model(x), model(x))
    # Dropout moves the numbering of the layers, not their order.
    for parameter, same in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, same)
    assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize("kind", ["per_dim", "per_field"])
def test_input_norm(kind: str) -> None:
    normed, plain, x = build(input_norm=kind), build(), batch(6)
    plain.load_state_dict({key: v for key, v in normed.state_dict().items() if not key.startswith("input_norm")})
    torch.testing.assert_close(normed(x), plain(normed.input_norm(x)))
    assert not torch.allclose(normed(x), plain(x))


def test_fields_of_different_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="Wukong needs fields of equal dims"):
        Wukong(2, [4, 8], 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": 0},
        {"fmb_embeddings": 0},
        {"lcb_embeddings": 0},
        {"fm_rank": 0},
        {"fmb_hidden": [0]},
        {"hidden": [0]},
        {"dropout": 0.1, "hidden": [], "fmb_hidden": []},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        WukongConfig(**settings)
