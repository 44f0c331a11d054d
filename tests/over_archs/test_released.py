"""Released weights give the released outputs: our SSR against plain numpy arithmetic of that code's formulas."""

from typing import Any

import numpy as np
import pytest
import torch

from ssr_rec.over_archs.ssr import SSR
from ssr_rec.over_archs.ssr_settings import SSRConfig
from tests.over_archs.released import load_released_weights

F, D, B, V, d, L, STEPS = 6, 5, 9, 4, 16, 2, 5
WIDTHS = (F * D, V * d)
SSR_D = SSRConfig(
    filter="dynamic",
    num_views=V,
    view_dim=d,
    num_layers=L,
    gate=True,
    residual=True,
    output="mean",
    input_norm="across_fields",
)
SSR_S = SSRConfig(
    filter="static",
    num_views=V,
    view_dim=d,
    num_layers=L,
    fusion_layers=2,
    residual=True,
    layer_norm_eps=1e-3,
    input_norm="per_field",
    output="mean",
    output_mlp=[64],
)
Arrays = dict[str, np.ndarray]


def arrays_for(config: SSRConfig) -> Arrays:
    rng = np.random.default_rng(0)

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.3 * rng.standard_normal(shape)).astype(np.float32)

    channels = D if config.input_norm == "across_fields" else F
    arrays = {f"input_norm/{name}": normal(channels) for name in ("gamma", "beta", "moving_mean")}
    arrays["input_norm/moving_variance"] = rng.uniform(0.001, 2, channels).astype(np.float32)
    for i, width in enumerate(WIDTHS):
        if config.filter == "dynamic":
            arrays |= {f"layer{i}/{name}": normal(V, width, d) for name in ("w_proj", "w_value")}
            arrays |= {f"layer{i}/alpha": normal(V, STEPS), f"layer{i}/gamma": normal(V, d, mean=1.0)}
        else:
            arrays[f"layer{i}/indices"] = np.stack([rng.permutation(width)[:d] for _ in range(V)])
        for dense in ("dense", "dense2")[: config.fusion_layers]:
            arrays |= {f"layer{i}/{dense}/kernel": normal(V, d, d), f"layer{i}/{dense}/bias": normal(V, d)}
        arrays |= {f"layer{i}/layer_norm/gamma": normal(V, d, mean=1.0), f"layer{i}/layer_norm/beta": normal(V, d)}
    if config.output_mlp:
        arrays |= {"output_mlp0/kernel": normal(d, 64), "output_mlp0/bias": normal(64)}
    return arrays


def erf(x: np.ndarray) -> np.ndarray:
    """Maclaurin series, in float64: exact enough below |x| = 5, and 1 beyond."""
    total = term = x.copy()
    for n in range(1, 150):
        term = -term * x * x / n
        total = total + term / (2 * n + 1)
    return np.where(np.abs(x) < 5, 2 / np.sqrt(np.pi) * total, np.sign(x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(np.clip(x / np.sqrt(2), -5, 5)))


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: float) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * scale + shift


def competed(z: np.ndarray, alpha: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    x = np.maximum(z, 0)
    for rate in alpha:
        x = np.maximum(x - rate * x.mean(-1, keepdims=True), 0)
    return gamma * x


def input_norm(x: np.ndarray, a: Arrays, axis: int) -> np.ndarray:
    """Keras's batch norm of the embeddings (B, F, D) along an axis: -1, its default, in SSR-D and -2 in SSR-S."""
    shape = (1, 1, D) if axis == -1 else (1, F, 1)
    gamma, beta, mean, variance = (
        a[f"input_norm/{name}"].reshape(shape) for name in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    return (gamma * (x.reshape(B, F, D) - mean) / np.sqrt(variance + 1e-3) + beta).reshape(B, -1)


def released_ssr_d(x: np.ndarray, a: Arrays) -> np.ndarray:
    y = input_norm(x, a, axis=-1)
    for i in range(L):
        views = []
        for v in range(V):
            w = {name.split("/", 1)[1]: array[v] for name, array in a.items() if name.startswith(f"layer{i}/")}
            u = competed(y @ w["w_proj"], w["alpha"], w["gamma"]) * (y @ w["w_value"])
            z = u + gelu(u @ w["dense/kernel"] + w["dense/bias"])
            views.append(layer_norm(z, w["layer_norm/gamma"], w["layer_norm/beta"], 1e-6))
        y = np.concatenate(views, -1)
    return np.mean(views, 0)


def released_ssr_s(x: np.ndarray, a: Arrays) -> np.ndarray:
    y = input_norm(x, a, axis=-2)
    for i in range(L):
        views = []
        for v in range(V):
            w = {name.split("/", 1)[1]: array[v] for name, array in a.items() if name.startswith(f"layer{i}/")}
            h = y[:, w["indices"]]
            z = gelu(gelu(h @ w["dense/kernel"] + w["dense/bias"]) @ w["dense2/kernel"] + w["dense2/bias"])
            views.append(layer_norm(h + z, w["layer_norm/gamma"], w["layer_norm/beta"], 1e-3))
        y = np.concatenate(views, -1)
    return np.maximum(np.mean(views, 0) @ a["output_mlp0/kernel"] + a["output_mlp0/bias"], 0)


@pytest.mark.parametrize(("config", "reference"), [(SSR_D, released_ssr_d), (SSR_S, released_ssr_s)], ids=["D", "S"])
def test_released_weights_give_the_released_outputs(config: SSRConfig, reference: Any) -> None:
    arrays = arrays_for(config)
    ssr = SSR(F, D, 1, config).eval()
    load_released_weights(ssr, arrays)
    x = np.random.default_rng(1).standard_normal((B, F * D)).astype(np.float32)
    with torch.no_grad():
        got = ssr(torch.from_numpy(x)).numpy()
    wanted = reference(
        x.astype(np.float64), {k: v if "indices" in k else v.astype(np.float64) for k, v in arrays.items()}
    )
    assert got.std() > 0.1
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_the_reference_erf_is_one() -> None:
    x = np.linspace(-4.9, 4.9, 99)
    np.testing.assert_allclose(erf(x), torch.erf(torch.from_numpy(x)).numpy(), atol=1e-6)


@pytest.mark.parametrize("config", [SSR_D, SSR_S], ids=["D", "S"])
def test_every_weight_has_a_released_name(config: SSRConfig) -> None:
    ssr = SSR(F, D, 1, config)
    for tensor in ssr.state_dict().values():
        tensor.fill_(-7)
    load_released_weights(ssr, arrays_for(config))
    assert not any((tensor == -7).any() for tensor in ssr.state_dict().values())


def broken(arrays: Arrays, name: str, value: np.ndarray | None) -> Arrays:
    rest = {key: array for key, array in arrays.items() if key != name}
    return rest if value is None else rest | {name: value}


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (SSR_D, "layer1/w_value", None, r"missing \['layer1/w_value'\]"),
        (SSR_D, "layer9/alpha", np.zeros(3), r"unknown \['layer9/alpha'\]"),
        (SSR_D, "layer0/w_proj", np.zeros((V, d, F * D)), r"'layer0/w_proj' has shape \(4, 16, 30\).*\(4, 30, 16\)"),
        (SSR_D, "layer1/layer_norm/beta", np.zeros(d), "'layer1/layer_norm/beta' has shape"),
        (SSR_S, "layer0/indices", np.zeros((V, d)), "'layer0/indices' is torch.float64"),
        (SSR_S, "layer0/indices", np.tile(np.arange(d) + F * D, (V, 1)), "from 0 to 29"),
        (SSR_S, "layer1/indices", np.zeros((V, d), dtype=np.int64), "distinct dims"),
    ],
)
def test_wrong_arrays_are_named_and_nothing_is_loaded(
    config: SSRConfig, name: str, value: np.ndarray | None, message: str
) -> None:
    ssr = SSR(F, D, 1, config)
    before = {key: tensor.clone() for key, tensor in ssr.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_released_weights(ssr, broken(arrays_for(config), name, value))
    assert all(torch.equal(tensor, before[key]) for key, tensor in ssr.state_dict().items())
