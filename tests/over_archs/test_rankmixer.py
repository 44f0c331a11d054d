"""RankMixer against its equations written out in loops over samples, tokens and heads."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ssr_rec.over_archs.rankmixer import RankMixer, mix_tokens
from ssr_rec.over_archs.settings import RankMixerConfig

NUM_FIELDS, DIM = 5, 4
SMALL = {"num_tokens": 3, "dim": 6, "num_layers": 2, "ffn_ratio": 2}


def build(seed: int = 0, dims: int | list[int] = DIM, **settings: Any) -> RankMixer:
    """Every parameter random, so that no bias of 0 or scale of 1 hides a mistake."""
    model = RankMixer(NUM_FIELDS, dims, 1, RankMixerConfig(**(SMALL | settings))).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch(rows: int = 4, width: int = NUM_FIELDS * DIM) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gelu(value: float) -> float:
    return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))


def layer_norm(token: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (token - token.mean()) / math.sqrt(token.var() + eps) * weight + bias


def mixed(tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Section 3.3.1: s^h = concat(x_1^h, ..., x_T^h), x_t^h being dims h * D/T to (h + 1) * D/T of token t."""
    head = len(tokens[0]) // len(tokens)
    return [np.concatenate([x[h * head : (h + 1) * head] for x in tokens]) for h in range(len(tokens))]


def reference(model: RankMixer, row: np.ndarray) -> np.ndarray:
    w = {key: value.numpy() for key, value in model.state_dict().items()}
    count, eps = model.config.num_tokens, model.config.layer_norm_eps
    piece = math.ceil(len(row) / count)
    padded = np.concatenate([row, np.zeros(count * piece - len(row))])
    tokens = [
        padded[t * piece : (t + 1) * piece] @ w["tokenizer.weight"][t] + w["tokenizer.bias"][t] for t in range(count)
    ]
    for n in range(model.config.num_layers):
        b = {key.removeprefix(f"blocks.{n}."): value for key, value in w.items()}
        norm1, norm2 = ([b[f"{norm}.{part}"] for part in ("weight", "bias")] for norm in ("mixing_norm", "ffn_norm"))
        s = [layer_norm(new + old, *norm1, eps) for new, old in zip(mixed(tokens), tokens, strict=True)]
        tokens = []
        for t in range(count):
            inner = np.array([gelu(v) for v in s[t] @ b["dense1.weight"][t] + b["dense1.bias"][t]])
            ffn = inner @ b["dense2.weight"][t] + b["dense2.bias"][t]
            tokens.append(layer_norm(ffn + s[t], *norm2, eps))
    return sum(tokens) / count


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_tokens": 5, "dim": 10}, {"num_tokens": 1}, {"num_layers": 3, "ffn_ratio": 3}, {"layer_norm_eps": 0.3}],
)
def test_equals_its_equations_written_out(settings: dict[str, Any]) -> None:
    model, x = build(**settings), batch()
    assert all(block.dense1.bias.shape[1] == model.config.ffn_ratio * model.config.dim for block in model.blocks)
    expected = np.stack([reference(model, row.numpy()) for row in x])
    torch.testing.assert_close(model(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_cuts_the_concatenation_whatever_the_dims_of_the_fields() -> None:
    x = batch()
    assert torch.equal(build(dims=[3, 1, 8, 2, 6])(x), build()(x))


def test_mixing_gathers_head_h_of_every_token_in_token_h() -> None:
    x = torch.tensor([[[11, 12, 13, 14, 15, 16]], [[21, 22, 23, 24, 25, 26]], [[31, 32, 33, 34, 35, 36]]])
    expected = [[[11, 12, 21, 22, 31, 32]], [[13, 14, 23, 24, 33, 34]], [[15, 16, 25, 26, 35, 36]]]
    assert mix_tokens(x).tolist() == expected


def test_the_last_piece_is_filled_up_with_zeros() -> None:
    model, x = build(), batch()
    assert (model.tokenizer.weight.shape[1], model.padding) == (7, 1)
    before = model(x)
    with torch.no_grad():
        model.tokenizer.weight[2, -1] = 1e6
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("tokens", [20, 10, 8, 11])
def test_a_token_of_nothing_but_zeros_is_refused(tokens: int) -> None:
    """20 dims: 20 pieces of 1 and 10 of 2 fill; pieces of ceil(20 / 8) = 3 leave none for the 8th."""
    config = RankMixerConfig(num_tokens=tokens, dim=2 * tokens)
    if tokens in (10, 20):
        assert RankMixer(NUM_FIELDS, DIM, 1, config).padding == 0
    else:
        with pytest.raises(ValueError, match=f"num_tokens={tokens} leaves the last token empty"):
            RankMixer(NUM_FIELDS, DIM, 1, config)


def test_defaults() -> None:
    model = RankMixer(39, 16, 1)
    piece, ffn = 624 // 8, 2 * 96 * 192
    assert model.num_parameters == 8 * (piece * 96 + 96) + 2 * (8 * (ffn + 192 + 96) + 4 * 96)
    assert model.flops().matmul == 2 * 8 * (piece * 96 + 2 * ffn)
    norms_and_residuals = 2 * 8 * 96 * (7 + 1)
    one_block = 8 * (192 + 5 * 192 + 96) + norms_and_residuals
    assert model.flops().elementwise == 8 * 96 + 2 * one_block + 8 * 96
    assert model.out_features == 96
    assert model.config.label == "RankMixer 8x96x2"


@pytest.mark.parametrize("initializer", ["glorot", "torch"])
def test_the_fans_are_those_of_one_token(initializer: str) -> None:
    torch.manual_seed(0)
    model = RankMixer(64, 16, 1, RankMixerConfig(num_tokens=16, dim=64, initializer=initializer))
    for weight in (model.tokenizer.weight, model.blocks[0].dense1.weight, model.blocks[0].dense2.weight):
        _, fan_in, fan_out = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out)) if initializer == "glorot" else 1 / math.sqrt(fan_in)
        assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert bool(model.tokenizer.bias.any()) == (initializer == "torch")


def test_dropout_acts_in_training_only() -> None:
    model, x = build(dropout=0.5), batch()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), build()(x))


@pytest.mark.parametrize("kind", ["per_dim", "per_field"])
def test_input_norm(kind: str) -> None:
    normed, plain, x = build(input_norm=kind), build(), batch(6)
    plain.load_state_dict({key: v for key, v in normed.state_dict().items() if not key.startswith("input_norm")})
    torch.testing.assert_close(normed(x), plain(normed.input_norm(x)))
    assert not torch.allclose(normed(x), plain(x))


def test_a_dim_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match="dim=10 is not divisible by num_tokens=4"):
        RankMixerConfig(num_tokens=4, dim=10)


@pytest.mark.parametrize(
    "settings", [{"num_tokens": 0}, {"dim": 0}, {"num_layers": 0}, {"ffn_ratio": 0}, {"dropout": 1.0}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        RankMixerConfig(**settings)
