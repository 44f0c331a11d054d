"""DCN v2 against plain loops over the paper's equations, TorchRec's cross networks and the paper's Table 6."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet, LowRankMixtureCrossNet

from ssr_rec.over_archs.dcn_v2 import DCNv2, MixtureCrossLayer
from ssr_rec.over_archs.settings import DCNv2Config

DIMS = [3, 1, 4]
N, ROWS, LAYERS, RANK, EXPERTS = sum(DIMS), 6, 3, 2, 3
KINDS: dict[str, dict[str, Any]] = {
    "full rank": {},
    "low rank": {"rank": RANK},
    "mixture": {"rank": RANK, "num_experts": EXPERTS},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(**settings: Any) -> DCNv2:
    """Every parameter drawn anew, biases and norms included."""
    config = DCNv2Config(**({"num_cross_layers": LAYERS, "hidden": [7, 5]} | settings))
    torch.manual_seed(0)
    model = DCNv2(len(DIMS), DIMS, 1, config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.5)
    return model


def batch(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(1)).double()


def weights(model: DCNv2) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def matvec(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.array([sum(matrix[i, j] * x[j] for j in range(len(x))) for i in range(len(matrix))])


def expert(w: dict[str, np.ndarray], layer: str, i: int, x: np.ndarray) -> np.ndarray:
    v, u = w[f"{layer}.down.weight"], w[f"{layer}.up.weight"]
    rows = slice(i * RANK, (i + 1) * RANK)
    inner = np.tanh(matvec(w[f"{layer}.core"][i].T, np.tanh(matvec(v[rows], x))))
    return matvec(u[:, rows], inner) + w[f"{layer}.up.bias"]


def crosses_by_loops(w: dict[str, np.ndarray], x0: np.ndarray, kind: str) -> np.ndarray:
    x = x0
    for number in range(LAYERS):
        layer = f"cross.layers.{number}"
        if kind == "mixture":
            logits = np.exp(matvec(w["cross.gates.weight"], x))
            gates = logits / logits.sum()
            update = sum(gates[i] * x0 * expert(w, layer, i, x) for i in range(EXPERTS))
        else:
            matrix = w[f"{layer}.up.weight"]
            if kind == "low rank":
                matrix = matrix @ w[f"{layer}.down.weight"]
            update = x0 * (matvec(matrix, x) + w[f"{layer}.up.bias"])
        x = update + x
    return x


def deep_by_loops(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    for number in (0, 2):
        x = np.maximum(matvec(w[f"deep.{number}.weight"], x) + w[f"deep.{number}.bias"], 0)
    return x


@every_kind
@pytest.mark.parametrize("structure", ["parallel", "stacked", "cross only"])
def test_equals_the_equations_sample_by_sample(kind: str, structure: str) -> None:
    model = build(**KINDS[kind], **({"hidden": []} if structure == "cross only" else {"structure": structure}))
    w, rows = weights(model), []
    for x0 in batch().numpy():
        crosses = crosses_by_loops(w, x0, kind)
        rows.append(
            {
                "parallel": lambda c=crosses, x=x0: np.concatenate([c, deep_by_loops(w, x)]),
                "stacked": lambda c=crosses: deep_by_loops(w, c),
                "cross only": lambda c=crosses: c,
            }[structure]()
        )
    y = model(batch())
    assert y.shape == (ROWS, model.out_features)
    torch.testing.assert_close(y, torch.from_numpy(np.stack(rows)), rtol=1e-11, atol=1e-11)


def torchrec_twin(model: DCNv2, kind: str) -> torch.nn.Module:
    layers = list(model.cross.layers)
    twin: Any
    if kind == "mixture":
        twin = LowRankMixtureCrossNet(N, LAYERS, EXPERTS, RANK, torch.tanh)
    else:
        twin = CrossNet(N, LAYERS) if kind == "full rank" else LowRankCrossNet(N, LAYERS, RANK)
    twin = twin.double()
    with torch.no_grad():
        for i, layer in enumerate(layers):
            twin.bias[i].copy_(layer.up.bias.view_as(twin.bias[i]))
            if kind == "full rank":
                twin.kernels[i].copy_(layer.up.weight)
            elif kind == "low rank":
                twin.V_kernels[i].copy_(layer.down.weight)
                twin.W_kernels[i].copy_(layer.up.weight)
            else:
                twin.V_kernels[i].copy_(layer.down.weight.view(EXPERTS, RANK, N))
                twin.C_kernels[i].copy_(layer.core.transpose(1, 2))
                twin.U_kernels[i].copy_(layer.up.weight.view(N, EXPERTS, RANK).transpose(0, 1))
        if kind == "mixture":
            for i, gate in enumerate(twin.gates):
                gate.weight.copy_(model.cross.gates.weight[i : i + 1])
    return twin


@every_kind
@pytest.mark.parametrize("rows", [1, ROWS])
def test_equals_torchrec_forward_and_backward(kind: str, rows: int) -> None:
    model = build(**KINDS[kind], hidden=[])
    results = []
    for module in (model, torchrec_twin(model, kind)):
        x = batch(rows).requires_grad_()
        y = module(x)
        (y * torch.arange(1.0, N + 1)).sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [None, RANK])
def test_n_cross_layers_are_a_polynomial_of_degree_n_plus_1(rank: int | None) -> None:
    model = build(rank=rank, hidden=[])
    t = torch.arange(LAYERS + 3).double().view(-1, 1)
    along_a_line = model(t * batch(1))
    scale = along_a_line.abs().max()
    assert along_a_line.diff(LAYERS + 1, dim=0).abs().max() > 1e-6 * scale
    assert along_a_line.diff(LAYERS + 2, dim=0).abs().max() < 1e-12 * scale


def test_experts_start_with_the_variance_of_one_expert() -> None:
    torch.manual_seed(0)
    layer = MixtureCrossLayer(100, DCNv2Config(rank=20, num_experts=50))
    for weight, fans in ((layer.down.weight, 120), (layer.core, 40), (layer.up.weight, 120)):
        assert weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.02)
    assert not layer.up.bias.any()


def test_layer_norm_and_dropout_are_the_deep_networks() -> None:
    model, x = build(layer_norm=True, dropout=0.5), batch()
    first, second = model(x), model(x)
    assert torch.equal(first[:, :N], second[:, :N]) and not torch.equal(first[:, N:], second[:, N:])
    w = model.state_dict()
    y = x
    for i in (0, 4):
        y = y @ w[f"deep.{i}.weight"].T + w[f"deep.{i}.bias"]
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        y = (y * w[f"deep.{i + 1}.weight"] + w[f"deep.{i + 1}.bias"]).clamp(min=0)
    torch.testing.assert_close(model.eval()(x)[:, N:], y)


def test_input_norm_comes_before_both_networks() -> None:
    model, x = build(input_norm="per_dim"), batch()
    norm = model.input_norm
    assert norm is not None
    normal = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-3).sqrt() * norm.weight + norm.bias
    expected = model(x)
    model.input_norm = torch.nn.Identity()
    torch.testing.assert_close(expected, model(normal))


@every_kind
def test_flops(kind: str) -> None:
    model = build(**KINDS[kind]).eval()
    with FlopCounterMode(display=False) as counter:
        model(batch())
    assert model.flops().matmul * ROWS == counter.get_total_flops()
    mixture = 5 * EXPERTS + 3 * EXPERTS * RANK
    per_layer = 3 * N + (mixture if kind == "mixture" else 0)
    assert model.flops().elementwise == LAYERS * per_layer + 2 * (7 + 5)


@pytest.mark.parametrize(
    ("settings", "parameters", "flops"),
    [
        ({"num_cross_layers": 2, "hidden": [768, 768]}, 3.5, 7.0),
        ({"num_cross_layers": 3, "hidden": [512, 512], "num_experts": 4, "rank": 64}, 2.4, 4.8),
        ({"num_cross_layers": 4, "hidden": [], "rank": 258}, 2.1, 4.2),
    ],
    ids=["DCN-V2", "DCN-Mix", "CrossNet"],
)
def test_sizes_of_the_papers_table_6(settings: dict[str, Any], parameters: float, flops: float) -> None:
    """Criteo: 26 embeddings of 39 dims and 13 numbers, in millions.

    The table's rank, 258, is that of all experts together. Its DCN-Mix has constant gates (section 7.3), its CrossNet
    no nonlinearity, hence the size of one low-rank layer.
    """
    model = DCNv2(39, [39] * 26 + [1] * 13, 1, DCNv2Config(**settings))
    gates = model.cross.gates.weight.numel() if model.cross.gates is not None else 0
    assert round((model.num_parameters - gates) / 1e6, 1) == parameters
    assert round((model.flops().matmul - 2 * gates * len(model.cross.layers)) / 1e6, 1) == flops


def test_defaults() -> None:
    model = DCNv2(39, 16, 1)
    assert model.out_features == 624 + 320
    assert model.num_parameters == 3 * (624 * 624 + 624) + 624 * 320 + 2 * 320 * 320 + 3 * 320


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "DCN v2 3 cross + 3x320"),
        ({"structure": "stacked", "rank": 64, "hidden": [64, 32]}, "DCN v2 3 cross r64, then 64-32"),
        ({"num_cross_layers": 2, "num_experts": 4, "rank": 8, "hidden": []}, "DCN-Mix 2 cross 4xr8"),
    ],
)
def test_label(settings: dict[str, Any], label: str) -> None:
    assert DCNv2Config(**settings).label == label


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 2},
        {"structure": "stacked", "hidden": []},
        {"layer_norm": True, "hidden": []},
        {"dropout": 0.1, "hidden": []},
        {"rank": 0},
        {"num_cross_layers": 0},
        {"hidden": [0]},
        {"dropout": 1.0},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        DCNv2Config(**settings)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=9 is above the input's width 8"):
        build(rank=N + 1)
