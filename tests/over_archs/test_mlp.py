"""Dense MLP against its layers written out."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from ssr_rec.over_archs.mlp import MLP
from ssr_rec.over_archs.settings import MLPConfig

NUM_FIELDS, DIM = 4, 3


def build(seed: int = 0, **settings: Any) -> MLP:
    torch.manual_seed(seed)
    return MLP(NUM_FIELDS, DIM, 2, MLPConfig(**({"hidden": [7, 5]} | settings)))


def batch(rows: int = 6) -> Tensor:
    return torch.randn(rows, NUM_FIELDS * DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_equals_its_layers_written_out(activation: str, layer_norm: bool) -> None:
    mlp, x = build(activation=activation, layer_norm=layer_norm, initializer="torch"), 1e-3 * batch()
    w = mlp.state_dict()
    step = 3 if layer_norm else 2
    y = x
    for i in range(2):
        y = y @ w[f"layers.{step * i}.weight"].T + w[f"layers.{step * i}.bias"]
        if layer_norm:
            y = F.layer_norm(y, y.shape[1:], eps=1e-6)
        y = y.clamp(min=0) if activation == "relu" else y * 0.5 * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(mlp(x), y, rtol=1e-4, atol=1e-5)


def test_defaults_are_three_relu_layers_of_320() -> None:
    mlp = MLP(39, 16, 1, MLPConfig())
    assert mlp.num_parameters == 624 * 320 + 2 * 320 * 320 + 3 * 320
    assert mlp.flops_per_sample == 2 * (624 * 320 + 2 * 320 * 320) + 3 * 2 * 320
    assert mlp.out_features == 320


def test_dropout_acts_in_training_only() -> None:
    mlp, x = build(dropout=0.5), batch()
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), build().eval()(x))


@pytest.mark.parametrize("kind", ["per_dim", "per_field"])
def test_input_norm(kind: str) -> None:
    mlp, x = build(input_norm=kind), batch()
    groups = x.view(6, -1, DIM if kind == "per_field" else 1)
    mean, std = groups.mean((0, 2), keepdim=True), (groups.var((0, 2), unbiased=False, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(mlp(x), mlp.layers(((groups - mean) / std).flatten(1)))


@pytest.mark.parametrize("settings", [{"hidden": []}, {"hidden": [0]}, {"activation": "tanh"}, {"dropout": 1.0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        MLPConfig(**settings)
